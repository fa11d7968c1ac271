"""A RabbitMQ for as long as a pytest session: `python -m tests.rabbitmq COMMAND …`.

The command gets `--beatless-broker` with its URL. Needs an installed RabbitMQ; listens on loopback
and keeps its files in a temporary directory. Exit status 3 if there is none.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import kombu

from beatless.local.ports import free_port

SCRIPTS = "/usr/lib/rabbitmq/bin"
"""Where Debian keeps the scripts that ask for no user of their own."""

PATIENCE = 300.0


class NoRabbitMQ(Exception):
    pass


@contextmanager
def process(
    command: list[str], environ: Mapping[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A child that is ended, with whatever it has started."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def rabbitmq() -> Iterator[str]:
    """The URL of a broker of our own."""
    server = shutil.which("rabbitmq-server", path=f"{SCRIPTS}:{os.environ['PATH']}")
    epmd = shutil.which("epmd")
    if server is None or epmd is None:
        raise NoRabbitMQ
    with tempfile.TemporaryDirectory(prefix="beatless-rabbitmq-") as made:
        directory = Path(made)
        port, names = free_port(), free_port()
        user, password = "beatless", secrets.token_urlsafe(12)
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{port}\n"
            f"default_user = {user}\ndefault_pass = {password}\n"
        )
        (directory / "plugins").write_text("[].\n")
        environ = os.environ | {
            "HOME": made,  # Erlang's cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_NODENAME": f"beatless-{port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_LOG_BASE": made,
            "RABBITMQ_LOGS": "-",
        }
        log = directory / "log"
        with process([epmd], environ, log), process([server], environ, log) as child:
            url = f"amqp://{user}:{password}@127.0.0.1:{port}//"
            wait_for(url, port, child, log)
            yield url


def wait_for(url: str, port: int, child: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the server that we started takes our password."""
    deadline, pause = monotonic() + PATIENCE, threading.Event()
    while monotonic() < deadline and child.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            with kombu.Connection(url, connect_timeout=5) as connection:
                connection.connect()
                return
        except (OSError, *kombu.Connection(url).connection_errors):
            pause.wait(0.2)
    raise SystemExit(f"RabbitMQ did not start:\n{log.read_text(errors='replace')[-4000:]}")


def main() -> int:
    try:
        with rabbitmq() as url:
            return subprocess.run([*sys.argv[1:], f"--beatless-broker={url}"]).returncode
    except NoRabbitMQ:
        sys.stderr.write("there is no RabbitMQ: install rabbitmq-server, or run make test\n")
        return 3


if __name__ == "__main__":
    sys.exit(main())
