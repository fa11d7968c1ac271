"""beatless.django: examples/django_shop, and tests/django_project.py in a copy of it."""

import re
import shutil
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


def test_the_example_and_all_of_its_module_work(
    shop: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "examples" / "django_shop", shop, dirs_exist_ok=True, ignore=ignored)
    shutil.copy(ROOT / "tests" / "django_project.py", shop / "test_project.py")
    (shop / "shop" / "asgi.py").write_text(BLOCKS["shop/asgi.py"])
    (shop / "shop" / "quick_settings.py").write_text(QUICK)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.quick_settings")
    found = outcomes(pytester, "--ds=shop.quick_settings")
    assert found.keys() == {"passed"}, found
    assert found["passed"] > 20


def test_the_page_of_the_docs_is_a_project_that_works_without_pytest_django(
    shop: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytester.mkpydir("shop")
    (package / "models.py").write_text(MODELS)
    for name in set(BLOCKS) - {"shop/asgi.py"}:
        (shop / name).write_text(BLOCKS[name])
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    found = outcomes(pytester, "-p", "no:django")
    assert found.pop("passed") == 1
    assert found.keys() <= {"warnings"}, found  # an option of pytest-django is unknown
