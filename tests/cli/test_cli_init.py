"""`beatless init`: what it writes works as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beatless.cli import run
from beatless.cli.init import TEMPLATES, requirement
from beatless.testing.servers import Services

ROOT = Path(__file__).parents[2]

ONLY_ITS_OWN = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_PLUGINS": "pytest_beatless,xdist.plugin",
}
"""What the new project's own environment has, and not the plugins that ours has beside it."""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("init") / "my-shop"
    assert run(["init", str(directory)]) == 0
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("services", ["embedded", pytest.param("external", marks=pytest.mark.long)])
def test_the_tests_of_a_new_project_pass_in_parallel(
    generated: Path, beatless_services: Services, services: str
) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BEATLESS", "PYTEST"))}
    if services == "external":
        environ["BEATLESS_DATABASE_URL"] = beatless_services.database_url
        environ["BEATLESS_REDIS_URL"] = beatless_services.redis_url
    for _ in range(2 if services == "external" else 1):
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "pytest",
                "-n",
                "2",
                "-q",
                f"--beatless-services={services}",
            ],
            cwd=generated,
            env=environ | ONLY_ITS_OWN | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "8 passed" in done.stdout


def test_a_new_project_is_formatted_and_has_everything_it_speaks_of(generated: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--isolated", "-q", "."], cwd=generated, check=True)
    subprocess.run(
        [*ruff, "format", "--isolated", "--line-length=100", "--check", "-q", "."],
        cwd=generated,
        check=True,
    )
    readme = (generated / "README.md").read_text()
    assert readme.startswith("# my-shop\n")
    for name in ("shop/orders.py", "shop/app.py", "tests/test_orders.py", "docker-compose.yml"):
        assert f"`{name}`" in readme
        assert (generated / name).exists()
    for template in TEMPLATES.rglob("*.template"):
        text = (generated / template.relative_to(TEMPLATES).with_suffix("")).read_text()
        assert "@NAME@" not in text
        assert "@BEATLESS@" not in text
    assert (generated / "requirements.txt").read_text() == f"{requirement()}\n"


@pytest.mark.long
def test_a_new_project_and_the_example_of_the_readme_are_typed(
    generated: Path, tmp_path: Path
) -> None:
    example = re.search(
        r"```python\n(# shop.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    (tmp_path / "readme_shop.py").write_text(example[1])
    done = subprocess.run(
        # As if beatless were installed and not edited: what is wrong in there is not the user's.
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--cache-dir",
            str(tmp_path / "cache"),
            ".",
            str(tmp_path / "readme_shop.py"),
        ],
        cwd=generated,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout.startswith("Success: no issues found in "), done.stdout + done.stderr


def test_make_test_of_a_new_project_uses_what_is_installed_there(generated: Path) -> None:
    """Without the installation, which is pip's work: the stamp says that it was done."""
    bin = generated / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "python").symlink_to(sys.executable)
    (generated / ".venv" / "installed").touch()
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "test", "ARGS=-q"],
        cwd=generated,
        # The suite itself may run under make, whose variables this one would inherit.
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ".venv/bin/python -m pytest -n auto -q\n"


def test_a_directory_with_something_in_it_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    assert run(["init", str(tmp_path)]) == 2
    assert "is not empty: choose a new one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert run(["init", str(tmp_path / "mine")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_an_empty_directory_is_taken_and_json_lists_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--json", "init", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert '"shop/orders.py"' in said
