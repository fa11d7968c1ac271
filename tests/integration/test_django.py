"""beatless.django: examples/django_shop, and tests/django_project.py in a copy of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from beatless.testing.servers import Services

ROOT = Path(__file__).parents[2]
BLOCKS = {
    match[1]: match[0]
    for match in re.findall(
        r"```(?:python|ini)\n(# (\S+?\.\w+)\b.*?)```",
        (ROOT / "docs" / "django.md").read_text(),
        re.DOTALL,
    )
}

QUICK = """
from shop.settings import *

MIGRATION_MODULES = dict.fromkeys(("admin", "auth", "contenttypes", "sessions"))
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
"""
"""Django's own tables are made at once: their migrations are most of the time of each test."""

OF_A_PAGE = {"shop/asgi.py", "shop/following.py"}
"""Files of the page that `tests/django_project.py` imports."""

OF_LATER_PARTS = {
    "shop/migrations/0002_trigger.py",
    "shop/settings_for_tests.py",
    "test_models.py",
}
"""Files of the page that go beyond its first project."""

OF_DJANGO_6 = {"shop/tasks.py", "test_tasks.py"}
"""Files of the page that `make test-django6` executes."""

OF_A_TRIGGER = """
from shop.models import Order


def test_a_row_has_its_run(beatless, db):
    beatless.apply_plans()
    order = Order.objects.create(title="book")
    beatless.work_until_idle()
    order.refresh_from_db()
    assert order.state == "shipped"
"""

OF_BOTH = """
import pytest


@pytest.mark.django_db
def test_it_would_have_two_databases(beatless, db): ...
"""

OF_NO_DATABASE = """
from django.test import TestCase


class OrderTests(TestCase):
    def test_it_would_have_a_database_of_djangos_own(self): ...
"""

MODELS = """
from django.db import models


class Order(models.Model):
    title = models.TextField()
    state = models.TextField(default="new")
"""


@pytest.fixture
def shop(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty directory, in which pytest uses our servers."""
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    return pytester.path


def outcomes(pytester: pytest.Pytester, *more: str) -> dict[str, int]:
    done = pytester.runpytest_subprocess(
        *("-p", "no:randomly", "-p", "no:celery", "-p", "no:schemathesis"),
        *("-p", "no:docker_tools", "-p", "no:valkey", "--beatless-services=external"),
        *more,
        timeout=600,
    )
    return done.parseoutcomes()


@pytest.mark.slow
def test_the_example_and_all_of_its_module_work(
    shop: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "examples" / "django_shop", shop, dirs_exist_ok=True, ignore=ignored)
    shutil.copy(ROOT / "tests" / "django_project.py", shop / "test_project.py")
    for name in OF_A_PAGE:
        (shop / name).write_text(BLOCKS[name])
    (shop / "shop" / "quick_settings.py").write_text(QUICK)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.quick_settings")
    found = outcomes(pytester, "--ds=shop.quick_settings")
    assert found.keys() == {"passed"}, found
    assert found["passed"] > 20


@pytest.mark.slow
def test_the_page_of_the_docs_is_a_project_that_works_without_pytest_django(
    shop: Path,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = pytester.mkpydir("shop")
    (package / "models.py").write_text(MODELS)
    for name in set(BLOCKS) - {*OF_A_PAGE, *OF_LATER_PARTS, *OF_DJANGO_6}:
        (shop / name).write_text(BLOCKS[name])
    (shop / "test_case.py").write_text(OF_NO_DATABASE)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    found = outcomes(pytester, "-p", "no:django")
    assert found == {"passed": 1, "errors": 1}
    assert "give these a server of their own" in capsys.readouterr().out


@pytest.mark.slow
def test_the_backend_of_tasks_names_the_django_that_it_needs() -> None:
    code = "import beatless.django.tasks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    needs = "beatless.django.tasks needs django.tasks, which Django has from 6.0 on, and this is 5."
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {needs}"), done.stderr


@pytest.mark.slow
def test_tests_in_djangos_own_database_and_with_the_kit_are_in_one_session(
    shop: Path,
    pytester: pytest.Pytester,
    beatless_services: Services,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of the page, and one of its trigger, which starts the runs that the view starts too."""
    shutil.copytree(ROOT / "examples" / "django_shop" / "shop", shop / "shop")
    for name in set(BLOCKS) - {*OF_A_PAGE, "test_shop.py", *OF_DJANGO_6}:
        (shop / name).write_text(BLOCKS[name])
    (shop / "test_trigger.py").write_text(OF_A_TRIGGER)
    (shop / "test_both.py").write_text(OF_BOTH)
    test_database = {
        "NAME": f"marked_of_{beatless_services.database_url[-4:]}_{os.getpid()}",
        "TEMPLATE": "template0",
    }
    with (shop / "shop" / "settings_for_tests.py").open("a") as settings:
        settings.write(f'DATABASES["default"]["TEST"] = {test_database}\n')
        settings.write(QUICK.partition("\n\n")[2])
    monkeypatch.setenv("DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings_for_tests")
    found = outcomes(pytester, "--ds=shop.settings_for_tests")
    assert (found.pop("passed"), found.pop("errors")) == (3, 1)
    assert "The test has the mark django_db" in capsys.readouterr().out
    assert found.keys() <= {"warnings"}, found
