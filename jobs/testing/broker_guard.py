"""Keeps publishes of a test on the test's own broker, from any Celery app.

kombu has no hook for it, so some methods of its and of Celery's are wrapped while a test runs.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery.backends.base import Backend, DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.rpc import RPCBackend
from kombu import Connection, Producer

WRITES = frozenset(
    {
        *("add_to_chord", "apply_chord", "on_chord_part_return", "save_group", "set_chord_size"),
        *("delete", "delete_group", "expire", "forget", "incr", "set", "store_result"),
    }
)
"""Methods of result backends that write to the server."""

IN_PROCESS = (DisabledBackend, RPCBackend)
"""Result backends that reach no server, or reach it through kombu, which is watched itself."""

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


class ForeignBroker(AssertionError):
    """Something would have been sent to a broker that is not the test's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The names and brokers of one test."""

    prefix: str
    """Of the names of its queues and exchanges, or of all keys of its Redis."""
    servers: tuple[str, ...]
    """Their `host:port`."""
    shared: bool
    """Whether others use them too, so that only names of the test's are its own there."""
    allowed: tuple[str, ...] = ()
    """Patterns of URLs of further brokers and result backends."""

    def has(self, connection: Connection, names: Sequence[str] = ()) -> bool:
        """Whether it leads to the test's broker; with names, to the test's own ones on it."""
        if connection.get_transport_cls().driver_type == "memory":
            return True
        keys = str((connection.transport_options or {}).get("global_keyprefix") or "")
        if any(name.startswith((f"{self.prefix}:", f"{self.prefix}.")) for name in (keys, *names)):
            return True
        port = connection.port or connection.transport.default_port
        if self._allows(connection.as_uri(), server(connection.hostname or "localhost", port)):
            return True
        if server(connection.hostname or "", port) not in self.servers:
            return False
        # Redis has a key for each queue. On other brokers there are connections before names.
        return not self.shared or not (names or "redis" in connection.transport.driver_type)

    def has_backend(self, backend: Backend) -> bool:
        """Whether a result backend keeps its results with the test."""
        if isinstance(backend, IN_PROCESS):
            return True
        if isinstance(backend, CacheBackend) and backend.backend in ("memory", "dummy"):
            return True
        url = str(backend.url or "")
        (where, *_) = servers([url])
        if url in ("db+sqlite://", "db+sqlite:///:memory:") or self._allows(url, where):
            return True
        return not self.shared and where in self.servers

    def _allows(self, url: str, where: str) -> bool:
        """By a pattern, or by a URL of the same server."""
        return any(fnmatchcase(url, one) or servers([one]) == (where,) for one in self.allowed)


def server(host: str, port: object) -> str:
    return f"{'localhost' if host in LOOPBACK else host}:{port}"


def servers(urls: Sequence[str]) -> tuple[str, ...]:
    """The servers that URLs of brokers name."""
    ports = {"redis": 6379, "rediss": 6379, "sentinel": 26379, "amqps": 5671}
    parts = [urlsplit(part) for url in urls for part in url.split(";")]
    return tuple(
        server(part.hostname or "localhost", part.port or ports.get(part.scheme, 5672))
        for part in parts
    )


class Guard:
    """Refuses publishes that would leave the fence, and remembers them for the end of the test."""

    def __init__(self, *, report: Path | None = None) -> None:
        """`report` is the file in which a process of the test notes its refusals."""
        self.fence: Fence | None = None
        """None while no test is fenced in."""
        self._report = report
        self._reports: list[Path] = []
        self._found: list[str] = []
        self._mutex = threading.Lock()

    def spec(self, report: Path) -> str:
        """The specification that `fenced` reads in a process of the test."""
        assert self.fence is not None  # noqa: S101 - a process is started within a test
        self._reports.append(report)
        return json.dumps({"report": str(report), **asdict(self.fence)})

    def take(self) -> list[str]:
        """The publishes refused since the last call."""
        with self._mutex:
            found, self._found = self._found, []
        for report in self._reports:
            if report.exists():
                found += report.read_text().splitlines()
                report.unlink()
        return list(dict.fromkeys(found))

    def refuse(self, what: str, url: str) -> None:
        """Raises ForeignBroker."""
        text = f"{what} {url}, which is not the test's own, and was not sent. {ADVICE}"
        if self._report is not None:
            with self._report.open("a") as report:
                report.write(text + "\n")
        with self._mutex:
            self._found.append(text)
        raise ForeignBroker(text)


ADVICE = (
    "Give that Celery app a broker of the test, as memory:// or task_always_eager, or name the "
    "broker in the fixture beatless_allowed_brokers"
)


@contextmanager
def watching(guard: Guard) -> Iterator[None]:
    """In this block, no Celery app of this process publishes beyond the guard's fence."""

    def connection(owner: Connection) -> None:
        if guard.fence is not None and not guard.fence.has(owner):
            guard.refuse("a Celery app or kombu would have connected to", owner.as_uri())

    def before(method: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Connection, *args: Any, **options: Any) -> Any:
            connection(self)
            return method(self, *args, **options)

        return checked

    publish, default_channel = Producer.publish, Connection.default_channel

    def checked_publish(self: Producer, body: Any, *args: Any, **options: Any) -> Any:
        owner = self.connection
        if guard.fence is not None and owner is not None:
            given = dict(zip(("routing_key",), args, strict=False)) | options
            exchange = given.get("exchange") or self.exchange
            names = [
                str(getattr(exchange, "name", exchange) or ""),
                str(given.get("routing_key") or self.routing_key or ""),
            ]
            if not guard.fence.has(owner, names):
                guard.refuse(described(given.get("headers"), names), owner.as_uri())
        return publish(self, body, *args, **options)

    def watched(self: Backend, name: str) -> Any:
        followed = name == "on_task_call"
        if (followed or name in WRITES) and guard.fence and not guard.fence.has_backend(self):
            if followed:  # before a task is sent: the message that follows has the name to report
                return lambda _producer, _task_id: None
            guard.refuse(
                f"a Celery app would have sent ({name}) to the result backend", self.as_uri()
            )
        return object.__getattribute__(self, name)

    with ExitStack() as undo:
        for kind, name, wrapped in (
            (Connection, "channel", before(Connection.channel)),
            (Connection, "_establish_connection", before(Connection._establish_connection)),
            (Connection, "default_channel", property(before(default_channel.fget))),
            (Producer, "publish", checked_publish),
        ):
            undo.callback(setattr, kind, name, vars(kind)[name])
            setattr(kind, name, wrapped)
        Backend.__getattribute__ = watched
        undo.callback(delattr, Backend, "__getattribute__")
        yield


def described(headers: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """A message as the start of a sentence."""
    task = (headers or {}).get("task")
    to = " ".join(repr(name) for name in names if name)
    return f"{f'the task {task}' if task else 'a message'} ({to}) would have been sent to"


@contextmanager
def fenced(spec: str) -> Iterator[None]:
    """In this block a process of a test, started with its `Guard.spec`, is fenced in like it."""
    given = json.loads(spec)
    guard = Guard(report=Path(given.pop("report")))
    lists = {name: tuple(given[name]) for name in ("servers", "allowed")}
    guard.fence = Fence(**given | lists)
    with watching(guard):
        yield
