"""Valkey as it is run elsewhere: behind Sentinels, behind TLS, as a Cluster, with ACL users."""

import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import redis

from beatless.local.ports import free_port
from beatless.local.valkey import EmbeddedValkey
from beatless.outbox.sockets import readable

CERTIFICATES = Path(__file__).parent / "certificates"
"""A test authority's certificate, and one for 127.0.0.1 and localhost. Good until 2126."""

PATIENT_MS = 600_000
"""So long Sentinels take no server for dead that is only slow; a test kills the one that is."""


def secret(directory: Path, password: str) -> Path:
    """A directory for a server that has this password."""
    directory.mkdir()
    (directory / "password").write_text(password)
    return directory


class SentinelServer(EmbeddedValkey):
    """The same binary, watching a master called `main`."""

    master: EmbeddedValkey

    def _prepare(self, _lock) -> None:
        self.port = self.port or free_port()
        lines = [
            f"requirepass {self.password}",
            f"sentinel sentinel-pass {self.password}",
            f"sentinel monitor main 127.0.0.1 {self.master.port} 2",
            f"sentinel auth-pass main {self.master.password}",
            f"sentinel down-after-milliseconds main {PATIENT_MS}",
            "sentinel failover-timeout main 2000",
        ]
        (self.directory / "valkey.conf").write_text("\n".join(lines) + "\n")

    def _command(self) -> Sequence[str]:
        binary, config, *_ = super()._command()
        port = ["--port", str(self.port), "--bind", "127.0.0.1"]
        return [binary, config, "--sentinel", *port]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A master with a replica and three Sentinels."""

    master: EmbeddedValkey
    replica: EmbeddedValkey
    sentinels: Sequence[SentinelServer]

    @property
    def url(self) -> str:
        password, sentinels = self.master.password, list(self.sentinels)
        hosts = [f"sentinel://:{password}@127.0.0.1:{sentinels[0].port}/0"]
        hosts += [f"sentinel://127.0.0.1:{other.port}" for other in sentinels[1:]]
        return f"{';'.join(hosts)}?master_name=main&sentinel_password={sentinels[0].password}"

    def _take_for_dead_after(self, milliseconds: int) -> None:
        for server in self.sentinels:
            with redis.Redis.from_url(server.url) as client:
                client.sentinel_set("main", "down-after-milliseconds", milliseconds)

    def kill_master(self) -> None:
        """Kill it, and wait until the Sentinels say that the replica has its place."""
        sentinel = redis.Redis.from_url(self.sentinels[0].url)
        with sentinel, sentinel.pubsub() as ear:
            ear.subscribe("+switch-master")
            ear.get_message(timeout=60)
            self.master.crash()
            self._take_for_dead_after(400)
            message = ear.get_message(ignore_subscribe_messages=True, timeout=60)
            while message is None or message["type"] != "message":
                message = ear.get_message(ignore_subscribe_messages=True, timeout=60)
        assert message["data"].split()[-1] == str(self.replica.port).encode()
        self._take_for_dead_after(PATIENT_MS)


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """Servers that know one another: the next death of the master is survived."""
    with ExitStack() as stack:
        master = stack.enter_context(EmbeddedValkey(secret(directory / "master", "servers-secret")))
        replica = stack.enter_context(
            EmbeddedValkey(
                secret(directory / "replica", "servers-secret"),
                settings={
                    "replicaof": f"127.0.0.1 {master.port}",
                    "masterauth": master.password,
                },
            )
        )
        sentinels = []
        for number in range(3):
            sentinel = SentinelServer(secret(directory / f"s{number}", "sentinels-secret"))
            sentinel.master = master
            sentinels.append(stack.enter_context(sentinel))
        for sentinel in sentinels:
            with redis.Redis.from_url(sentinel.url) as client:
                until(lambda client=client: knows_all(client))
        yield Watched(master=master, replica=replica, sentinels=sentinels)


def knows_all(sentinel: redis.Redis) -> bool:
    """Whether a Sentinel has found the replica and the two others."""
    facts = sentinel.sentinel_master("main")
    return facts["num-slaves"] == 1 and facts["num-other-sentinels"] == 2


def until(condition, seconds: float = 60) -> None:
    """Ask again and again: some facts of these servers are announced nowhere."""
    ticking, deadline = threading.Event(), monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not come true"
        ticking.wait(0.02)


@contextmanager
def cluster(directory: Path) -> Iterator[list[EmbeddedValkey]]:
    """Three nodes with all slots, no replicas."""
    with ExitStack() as stack:
        nodes = []
        for number in range(3):
            settings = {
                "cluster-enabled": "yes",
                "cluster-port": str(free_port()),
                "cluster-config-file": "nodes.conf",
            }
            nodes.append(
                stack.enter_context(EmbeddedValkey(directory / f"n{number}", settings=settings))
            )
        clients = [stack.enter_context(redis.Redis.from_url(node.url)) for node in nodes]
        for number, client in enumerate(clients):
            first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
        for node in nodes[1:]:
            port, bus = node.port, node.settings["cluster-port"]
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", port, bus)
        for client in clients:
            until(lambda client=client: complete(client))
        yield nodes


def complete(node: redis.Redis) -> bool:
    facts = node.execute_command("CLUSTER INFO")
    text = (
        facts
        if isinstance(facts, dict)
        else dict(line.split(":", 1) for line in facts.decode().split())
    )
    return text["cluster_state"] == "ok" and text["cluster_known_nodes"] == "3"


class TlsFront:
    """Ends TLS in front of a server that has none, as stunnel does."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(CERTIFICATES / "server.pem", CERTIFICATES / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._carry, args=(plain,))
            self._threads.append(thread)
            thread.start()

    def _carry(self, plain: socket.socket) -> None:
        with suppress(OSError), plain:
            plain.settimeout(60)
            with (
                self._context.wrap_socket(plain, server_side=True) as outside,
                socket.create_connection(("127.0.0.1", self._target)) as inside,
            ):
                self._sockets += [outside, inside]
                while not self._closing.is_set():
                    ready = [outside] if outside.pending() else []
                    ready = ready or readable([outside, inside], 0.1)
                    for one in ready:
                        data = one.recv(65536)
                        if not data:
                            return
                        (inside if one is outside else outside).sendall(data)

    def close(self) -> None:
        """Hang up on everybody."""
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@contextmanager
def behind_tls(server: EmbeddedValkey) -> Iterator[int]:
    """The port of a TLS front of the server."""
    front = TlsFront(server.port)
    try:
        yield front.port
    finally:
        front.close()
