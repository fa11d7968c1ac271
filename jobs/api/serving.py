"""Serves the API of an app with uvicorn."""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from beatless import loopback
from beatless.api.connections import Connections, raise_descriptor_limit, share
from beatless.api.server import create_api
from beatless.app import App
from beatless.errors import BadRequest
from beatless.observe.systemd import ServiceManager

STUCK_MS = 60_000
"""Seconds for which unacknowledged bytes of a viewer are kept."""


def serve(
    app: App,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    reuse_port: bool = False,
    **options: Any,
) -> None:
    """Serve the API until it is asked to stop; `ready` gets the URL once it answers.

    The options are those of `make_server`. With `reuse_port` several processes may serve the same
    address. Raises BadRequest for an address that cannot be listened on.
    """
    sockets = bind(host, port, reuse_port=reuse_port)
    url = loopback.url(host, sockets[0].getsockname()[1])
    make_server(app, ready=lambda: ready(url), **options).run(sockets=sockets)


def make_server(
    app: App,
    *,
    ready: Callable[[], None],
    root_path: str = "",
    descriptors: int | None = None,
    **options: Any,
) -> uvicorn.Server:
    """A server of the app's API, to be run with sockets; `ready` is called once it answers.

    `descriptors` is how many files it may have open: by default the process's limit, raised.
    `root_path` is the prefix that a proxy strips from paths; the options are those of `create_api`.
    """
    api = create_api(app, **options)
    supervisor = ServiceManager()
    connections, backlog = share(descriptors or raise_descriptor_limit())

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            supervisor.alive()
            return await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Their viewers come again, at another process or at our successor.
            api.state.services.now().open_streams.end_all()
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            api,
            http=Connections(connections).protocol(),
            backlog=backlog,
            ws="none",
            root_path=root_path,
            log_level="warning",
            log_config=None,
            proxy_headers=False,  # a client must not choose its own address
            access_log=False,  # it would hold the tokens of streams
            server_header=False,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=64 * 1024,
        )
    )


def bind(host: str, port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Sockets on every address of a host, all on one port; 0 takes a free one."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            chosen = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Inherited by connections: bytes for a dead or stuck viewer are not kept for ever.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_MS)
            listener.bind(chosen)
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise BadRequest("--host", f"{host} port {port} cannot be used: {error}") from error
    return sockets
