"""`django.tasks` on beatless: `make test-django6`, in an environment with Django 6.

A project that uses it, and Django's own tests of its tasks, from its source distribution. Those
that do not pass are listed, with the reasons, in `not_passed.txt`: no more and no fewer.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import django
import pytest

from beatless.testing.servers import Services

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = (ROOT / "docs" / "django.md").read_text()
BLOCKS = {
    name: text for text, name in re.findall(r"```python\n(# (\S+?\.py)\b.*?)```", PAGE, re.DOTALL)
}
PINNED = (ROOT / "requirements-django6.txt").read_text()

NAMES = {
    "from django.tasks.backends.dummy import DummyBackend": (
        "from harness import StoredBackend as DummyBackend"
    ),
    "from django.tasks.backends.immediate import ImmediateBackend": (
        "from harness import ExecutedBackend as ImmediateBackend"
    ),
    "django.tasks.backends.dummy.DummyBackend": "harness.StoredBackend",
    "django.tasks.backends.immediate.ImmediateBackend": "harness.ExecutedBackend",
    # It takes apps out of INSTALLED_APPS, for the speed of Django's own suite.
    "available_apps = []": 'available_apps = ["beatless.django"]',
}
"""Names of Django's backends in its tests, and ours in their place."""


def run(*command: str | Path, cwd: Path, services: Services | None = None) -> str:
    """The output of a command, which may fail."""
    environ = {**os.environ, "PYTHONPATH": str(cwd)}
    if services is not None:
        environ["BEATLESS_DATABASE_URL"] = services.database_url
        environ["BEATLESS_REDIS_URL"] = services.redis_url
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    return done.stdout


def run_pytest(cwd: Path, services: Services, *more: str) -> str:
    common = ("-q", "-p", "no:cacheprovider", "-p", "no:celery", "--beatless-services=external")
    return run(sys.executable, "-m", "pytest", *common, *more, cwd=cwd, services=services)


def test_the_shop_and_the_page_of_the_docs_work_with_tasks(
    tmp_path: Path, beatless_services: Services
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shop = ROOT / "examples" / "django_shop"
    shutil.copytree(shop, tmp_path, dirs_exist_ok=True, ignore=ignored)
    (setting,) = re.findall(r"```python\n(TASKS = .*?)```", PAGE, re.DOTALL)
    with (tmp_path / "shop" / "settings.py").open("a") as settings:
        settings.write(f"\n{setting}\n")
        settings.write('MIGRATION_MODULES = dict.fromkeys(("admin", "auth", "contenttypes", ')
        settings.write('"sessions"))\n')
    more = (HERE / "shop_tasks.py").read_text()
    (tmp_path / "shop" / "tasks.py").write_text(BLOCKS["shop/tasks.py"] + more)
    (tmp_path / "test_tasks.py").write_text(BLOCKS["test_tasks.py"])
    shutil.copy(HERE / "project.py", tmp_path / "test_project.py")
    told = run_pytest(tmp_path, beatless_services)
    assert re.search(r"^\d+ passed(, 1 warning)? in ", told, re.MULTILINE), told


@pytest.fixture
def djangos_tests(tmp_path: Path) -> Path:
    """The folder `tests/tasks` of Django's source distribution, with our backends in it."""
    (pin,) = re.findall(r"^django==.*?(?=^\S|\Z)", PINNED, re.DOTALL | re.MULTILINE)
    (tmp_path / "pinned.txt").write_text(pin)
    pip = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check")
    only = ("--no-deps", "--no-binary", "django", "--no-build-isolation", "--require-hashes")
    told = run(*pip, *only, "-r", "pinned.txt", cwd=tmp_path)
    archives = [*tmp_path.glob("*.tar.gz")]
    assert [each.name.lower() for each in archives] == [f"django-{django.__version__}.tar.gz"], told
    with tarfile.open(archives[0]) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("[dD]jango-*/tests/tasks")
    for path in folder.glob("test_*.py"):
        source = path.read_text()
        for theirs, ours in NAMES.items():
            source = source.replace(theirs, ours)
        path.write_text(source)
    (folder / "test_custom_backend.py").unlink()  # about backends that the file itself declares
    return folder


def test_djangos_own_tests_pass_but_for_those_listed(
    djangos_tests: Path, tmp_path: Path, beatless_services: Services
) -> None:
    place = tmp_path / "place"
    shutil.copytree(djangos_tests, place / "tasks")
    shutil.copy(HERE / "harness.py", place)
    shutil.copy(HERE / "djangos_conftest.py", place / "conftest.py")
    shutil.copy(HERE / "djangos_settings.py", place / "settings.py")
    (place / "pytest.ini").write_text("[pytest]\nbeatless_app = beatless.django:app\n")
    told = run_pytest(place, beatless_services, "tasks")
    assert "error" not in told.splitlines()[-1], told
    lines = (place / "outcomes.txt").read_text().splitlines()
    every = {line.rpartition(" ")[0] for line in lines}
    failed = {line.rpartition(" ")[0] for line in lines if line.endswith(" failed")}
    listed = {
        line.partition(": ")[0]
        for line in (HERE / "not_passed.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert failed == listed, told
    assert len(every) > 60
    assert len(failed) <= len(every) / 10
