"""The environments that peers run in: one for each, under a cache folder, from pinned hashes.

A folder is named by the hash of its lock file and by its interpreter: another lock is another
folder, and one that is complete is used again. Packages come from where pip and npm of this machine
get them.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCKS = Path(__file__).parent / "locks"
INSTALL_TIMEOUT_S = 600.0
NEWEST_PYTHON_MINOR = 13


class CannotInstall(Exception):
    """A peer has no environment here; the message says why."""


def cache() -> Path:
    """The folder of all environments: below `$XDG_CACHE_HOME`, which is ~/.cache by default."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "beatless" / "peers"


def python_environment(lock: str, *, least: tuple[int, int] = (3, 11)) -> Path:
    """The interpreter of a virtual environment with what `locks/<lock>.txt` lists.

    Raises CannotInstall if no interpreter is new enough, or a package cannot be had.
    """
    requirements = LOCKS / f"{lock}.txt"
    interpreter = _interpreter(least)
    folder = cache() / f"{lock}-{_digest(requirements)}-{_version(interpreter)}"
    with _built_once(folder) as needed:
        if needed:
            _run([interpreter, "-m", "venv", "--clear", str(folder)])
            install = [*("-m", "pip", "install", "-q", "--require-hashes"), "-r", str(requirements)]
            _run([str(folder / "bin" / "python"), *install])
    return folder / "bin" / "python"


def node_environment(lock: str) -> Path:
    """A folder with the `node_modules` of `locks/<lock>/package-lock.json`.

    Raises CannotInstall if there is no node or npm, or a package cannot be had.
    """
    if not (shutil.which("node") and shutil.which("npm")):
        raise CannotInstall("there is no node with npm on the PATH")
    source = LOCKS / lock
    folder = cache() / f"{lock}-{_digest(source / 'package-lock.json')}"
    with _built_once(folder) as needed:
        if needed:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            _run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], folder=folder)
    return folder


def versions(lock: str) -> dict[str, str]:
    """The pinned version of each package of a lock for Python."""
    lines = (LOCKS / f"{lock}.txt").read_text().splitlines()
    pins = (line.split()[0].partition("==") for line in lines if "==" in line)
    return {name: version for name, _, version in pins}


@contextmanager
def _built_once(folder: Path) -> Iterator[bool]:
    """Whether the folder must be built, by this process alone; it is complete if the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder.parent / f"{folder.name}.complete"
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not complete.exists()
        complete.touch()


def _interpreter(least: tuple[int, int]) -> str:
    """This one if it is new enough, else the first of the machine that is and that runs."""
    versions = [f"3.{minor}" for minor in range(least[1], NEWEST_PYTHON_MINOR + 1)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    names = [sys.executable, *(f"python{version}" for version in versions)]
    names += [str(name) for each in versions for name in sorted(pyenv.glob(f"{each}.*/bin/python"))]
    for name in names:
        try:
            found = tuple(int(part) for part in _version(name).split("."))
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        if found >= least:
            return name
    raise CannotInstall(
        f"there is no Python >= {'.'.join(map(str, least))} on the PATH or of pyenv"
    )


def _version(interpreter: str) -> str:
    """Its major and minor version, as "3.12"."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run(
        [interpreter, "-c", ask], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()


def _digest(lock: Path) -> str:
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:12]


def _run(command: Sequence[str], *, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            check=False,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise CannotInstall(f"{command[0]} took more than {INSTALL_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotInstall(said[-1] if said else f"{command[0]} failed")
