"""Redis URLs for redis-py and for kombu, which read them differently.

    redis://user:password@host:6379/0          one server; of a Cluster, any of its nodes
    rediss://…                                 the same with TLS, and certificates are checked
    unix:///run/redis.sock?db=0
    sentinel://user:password@one:26379/0;sentinel://two:26379?master_name=main

TLS options are redis-py's, as a query: `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`,
`ssl_cert_reqs`, `ssl_check_hostname`. With any of them, or `ssl=true`, a `sentinel://` URL uses TLS
to the Sentinels and to the servers. The user is the servers'; `sentinel_username` and
`sentinel_password` are the Sentinels' own.
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from beatless.credentials import Password

if TYPE_CHECKING:
    import redis
    from redis import asyncio as aioredis

SCHEMES = ("redis", "rediss", "unix", "sentinel")

CERTIFICATES = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}
FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_OPTIONS = (*FILES, "ssl_cert_reqs", "ssl_check_hostname")
SENTINEL_TIMEOUT_S = 1.0
"""Seconds for each Sentinel: they are asked in turn, and the first may be the one that is gone."""

UNQUOTED = "has a /, ? or # in its user or password: write them as %2F, %3F and %23"

SENTINEL_OPTIONS = ("master_name", "sentinel_username", "sentinel_password", "ssl")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """One Redis, however it is reached."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    """The server, or the Sentinels."""
    username: str | None
    password: str | None = field(repr=False)
    db: int
    path: str
    """Of a socket, for `unix`."""
    tls: Mapping[str, Any] | None
    """redis-py's `ssl_…` options; None without TLS."""
    master: str
    """The name that the Sentinels know the servers by, for `sentinel`."""
    sentinel: Mapping[str, Any] = field(repr=False)
    """The credentials of the Sentinels themselves."""
    credentials: Password | None = field(default=None, repr=False)
    """Gives the password at each connect, instead of the URL."""

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises ValueError, with the problem as the end of a sentence about the setting."""
        parts = [urlsplit(part) for part in url.split(";")]
        schemes = {part.scheme for part in parts}
        if len(schemes) > 1 or not schemes <= set(SCHEMES):
            raise ValueError("is not a redis://, rediss://, unix:// or sentinel:// URL")
        (scheme,) = schemes
        if len(parts) > 1 and scheme != "sentinel":
            raise ValueError("names several servers, which only a sentinel:// URL may")
        if scheme != "unix" and any("@" in part.path + part.fragment for part in parts):
            raise ValueError(UNQUOTED)
        options = dict(pair for part in parts for pair in parse_qsl(part.query))
        known = {*TLS_OPTIONS, *(SENTINEL_OPTIONS if scheme == "sentinel" else ()), "db"}
        if unknown := sorted(options.keys() - known):
            raise ValueError(f"has the option {unknown[0]}, which is none of {sorted(known)}")
        if scheme == "sentinel" and not options.get("master_name"):
            raise ValueError("names no master: add ?master_name=NAME, as the Sentinels know it")
        secure = scheme == "rediss" or (
            scheme == "sentinel"
            and (options.get("ssl") == "true" or any(name in options for name in TLS_OPTIONS))
        )
        if not secure and (given := [name for name in TLS_OPTIONS if name in options]):
            raise ValueError(f"has the option {given[0]} without TLS: begin it with rediss://")
        credentials = next((part for part in parts if part.password or part.username), parts[0])
        paths = [part.path.strip("/") for part in parts if part.path.strip("/")]
        database = options.get("db") or (paths[0] if paths and scheme != "unix" else "0")
        if not database.isdecimal():
            raise ValueError(f"names the database {database!r}, which is not a number")
        port = 26379 if scheme == "sentinel" else 6379
        try:
            hosts = [(part.hostname or "localhost", part.port or port) for part in parts]
        except ValueError as error:
            if any("@" in part.query for part in parts):
                raise ValueError(UNQUOTED) from None
            raise ValueError(f"has a bad port: {error}") from None
        return cls(
            scheme=scheme,
            hosts=tuple(hosts),
            username=unquote(credentials.username or "") or None,
            password=unquote(credentials.password or "") or None,
            db=int(database),
            path=parts[0].path if scheme == "unix" else "",
            tls=_tls(options) if secure else None,
            master=options.get("master_name", ""),
            sentinel={
                name: options[f"sentinel_{name}"]
                for name in ("username", "password")
                if f"sentinel_{name}" in options
            },
        )

    def client(self, **options: Any) -> "redis.Redis":
        """A client; through Sentinels, it asks them for the master whenever it connects."""
        # Here, as in the other methods: URLs are read by who never connects to Redis, too.
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
        from redis.sentinel import Sentinel

        from beatless.redis_connections import SentinelPool

        options = self._login() | options
        if self.scheme == "sentinel":
            kwargs = self._sentinel(options) | {"retry": Retry(NoBackoff(), 0)}
            asked: Any = Sentinel(self.hosts, sentinel_kwargs=kwargs)  # type: ignore[no-untyped-call]  # redis-py's gap
            found: redis.Redis = asked.master_for(
                self.master, connection_pool_class=SentinelPool, **self._secured(), **options
            )
            return found
        if self.scheme == "unix":
            pool = redis.ConnectionPool(
                redis.UnixDomainSocketConnection, path=self.path, **_without_tcp(options)
            )
        else:
            kind = redis.Connection if self.tls is None else redis.SSLConnection
            host, port = self.hosts[0]
            pool = redis.ConnectionPool(kind, host=host, port=port, **self.tls or {}, **options)
        return redis.Redis.from_pool(pool)

    def aclient(self, **options: Any) -> "aioredis.Redis":
        """`client` for asyncio."""
        from redis import asyncio as aioredis
        from redis.asyncio.retry import Retry
        from redis.asyncio.sentinel import Sentinel
        from redis.backoff import NoBackoff

        from beatless.redis_connections import AsyncSentinelPool

        options = self._login() | options
        if self.scheme == "sentinel":
            kwargs = self._sentinel(options) | {"retry": Retry(NoBackoff(), 0)}
            asked: Any = Sentinel(self.hosts, sentinel_kwargs=kwargs)  # type: ignore[no-untyped-call]  # redis-py's gap
            found: aioredis.Redis = asked.master_for(
                self.master, connection_pool_class=AsyncSentinelPool, **self._secured(), **options
            )
            return found
        if self.scheme == "unix":
            pool = aioredis.ConnectionPool(
                aioredis.UnixDomainSocketConnection, path=self.path, **_without_tcp(options)
            )
        else:
            kind = aioredis.Connection if self.tls is None else aioredis.SSLConnection
            host, port = self.hosts[0]
            pool = aioredis.ConnectionPool(kind, host=host, port=port, **self.tls or {}, **options)
        return aioredis.Redis.from_pool(pool)

    def broker(self) -> dict[str, Any]:
        """Celery's settings for this Redis as the broker.

        kombu checks no certificate of a rediss:// URL unless it is told to, so it is told.
        """
        login = ""
        if self.username or self.password:
            login = f"{quote(self.username or '', safe='')}:{quote(self.password or '', safe='')}@"
        if self.scheme == "unix":
            url = f"redis+socket://{login}{self.path}?virtual_host={self.db}"
            return {"broker_url": url, "broker_transport_options": {}}
        servers = [
            f"{self.scheme}://{login}{_bracketed(host)}:{port}/{self.db}"
            for host, port in self.hosts
        ]
        found: dict[str, Any] = {"broker_url": ";".join(servers), "broker_transport_options": {}}
        if self.tls is not None:
            found["broker_use_ssl"] = dict(self.tls)
        if self.scheme == "sentinel":
            found["broker_transport_options"] = {
                "master_name": self.master,
                "sentinel_kwargs": self._sentinel({"socket_timeout": 5}),
            }
        return found

    def _login(self) -> dict[str, Any]:
        if self.credentials is not None:
            from beatless.redis_connections import RedisCredentials

            provider = RedisCredentials(self.username, self.credentials)
            return {"credential_provider": provider, "db": self.db}
        return {"username": self.username, "password": self.password, "db": self.db}

    def _secured(self) -> dict[str, Any]:
        return {} if self.tls is None else {"ssl": True, **self.tls}

    def _sentinel(self, options: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if name.startswith("socket_")}
        given |= dict.fromkeys(("socket_timeout", "socket_connect_timeout"), SENTINEL_TIMEOUT_S)
        return {**given, **self._secured(), **self.sentinel}


def _tls(options: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: options[name] for name in FILES if name in options}
    for name, path in found.items():
        if not os.access(path, os.R_OK):
            raise ValueError(f"names {path} as {name}, which cannot be read")
    wanted = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if wanted not in CERTIFICATES:
        raise ValueError(f"has ssl_cert_reqs={wanted}; choose none, optional or required")
    found["ssl_cert_reqs"] = CERTIFICATES[wanted]
    found["ssl_check_hostname"] = (
        wanted != "none" and options.get("ssl_check_hostname", "true").lower() != "false"
    )
    return found


def _without_tcp(options: Mapping[str, Any]) -> dict[str, Any]:
    tcp = ("socket_connect_timeout", "socket_keepalive")
    return {name: value for name, value in options.items() if name not in tcp}


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
