"""`beatless init`: what it writes works as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beatless.cli import run
from beatless.cli.init import EXTRAS
from beatless.testing.servers import Services

ROOT = Path(__file__).parents[2]

ONLY_ITS_OWN = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_PLUGINS": "pytest_beatless,xdist.plugin",
}
"""What the new project's own environment has, and not the plugins that ours has beside it."""


@pytest.fixture(scope="module", params=["celery"])
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project, of the template that a test names."""
    directory = tmp_path_factory.mktemp("init") / "my-shop"
    assert run(["init", str(directory), "--template", request.param]) == 0
    return directory


of_each = pytest.mark.parametrize("generated", EXTRAS, indirect=True)


def passing(generated: Path, servers: Services | None, *options: str) -> str:
    """What pytest says of a new project; on servers of its own, or on these."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BEATLESS", "PYTEST"))}
    if servers is not None:
        environ["BEATLESS_DATABASE_URL"] = servers.database_url
        environ["BEATLESS_REDIS_URL"] = servers.redis_url
    services = "embedded" if servers is None else "external"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", f"--beatless-services={services}", *options],
        cwd=generated,
        env=environ | ONLY_ITS_OWN | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tests_of_a_new_project_pass_in_parallel(generated: Path) -> None:
    assert "8 passed" in passing(generated, None, "-n", "2")


@pytest.mark.long
def test_the_tests_of_a_new_project_pass_again_on_servers_that_are_there(
    generated: Path, beatless_services: Services
) -> None:
    for _ in range(2):
        assert "8 passed" in passing(generated, beatless_services, "-n", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generated", "passed"), [("fastapi", 8), ("django", 5)], indirect=["generated"]
)
def test_the_tests_of_a_new_project_of_a_framework_pass(
    generated: Path, passed: int, beatless_services: Services
) -> None:
    assert f"{passed} passed" in passing(generated, beatless_services, "-n", "0")


@of_each
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
    names = re.findall(r"^\| `(\S+)` \|", readme, re.MULTILINE)
    assert {"shop/orders.py", "tests/test_orders.py", "docker-compose.yml"} <= set(names)
    for name in names:
        assert (generated / name).exists(), name
    ignored = (generated / ".gitignore").read_text().split()
    assert {".env", "dev.env", ".venv/"} <= {*ignored}  # the passwords of `make dev` and the docs
    for path in filter(Path.is_file, generated.rglob("*")):
        assert not re.search(rb"@[A-Z]+@", path.read_bytes()), path


@pytest.mark.long
@pytest.mark.parametrize("generated", ["celery", "fastapi"], indirect=True)  # Django has no types
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


def test_a_new_project_needs_this_beatless_with_what_its_framework_needs(tmp_path: Path) -> None:
    wanted = {}
    for template in EXTRAS:
        assert run(["init", str(tmp_path / template), "--template", template]) == 0
        wanted[template] = (tmp_path / template / "requirements.txt").read_text()
    assert wanted["fastapi"] == wanted["celery"] + "itsdangerous\n"  # the signature of its sessions
    assert re.fullmatch(r"beatless\[dev,test\](==| @ )\S+\n", wanted["celery"])
    assert wanted["django"] == wanted["celery"].replace("[dev,test]", "[dev,django,test]")


def test_a_template_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", str(tmp_path / "new"), "--template", "rails"]) == 2
    assert "'celery', 'fastapi', 'django'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


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
