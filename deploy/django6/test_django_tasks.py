"""`django.tasks` on beatless: `make test-django6`, in an environment with Django 6.

project.py is executed in a copy of examples/django_shop, with what docs/django.md adds to it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from beatless.testing.servers import Services

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = (ROOT / "docs" / "django.md").read_text()
BLOCKS = {
    name: text for text, name in re.findall(r"```python\n(# (\S+?\.py)\b.*?)```", PAGE, re.DOTALL)
}


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
    told = run_pytest(tmp_path, beatless_services)  # which knows no option of pytest-django
    assert re.search(r"^\d+ passed(, 1 warning)? in ", told, re.MULTILINE), told
