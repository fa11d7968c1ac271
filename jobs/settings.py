"""The settings of an app. The only reader of the environment."""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import quote, unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from beatless.credentials import Password, from_command
from beatless.errors import BadSetting
from beatless.outbox.faults import CrashPoints
from beatless.outbox.times import MOST_S, is_number
from beatless.redis_urls import RedisUrl

NAME = re.compile(r"[a-z_][a-z0-9_]{0,30}")

MOST_DAYS = 1_000_000

LEAST_EVENT_BYTES = 200
"""The size of the largest event that beatless writes with data of its own."""

REDIS = ("redis://", "rediss://", "unix://", "sentinel://")

LINK = re.compile(
    r"""(?P<name>\w+?)(?:
        _SERVICE_HOST=[\w.:-]+
      | _SERVICE_PORT(?:_[A-Z0-9_]+)?=[0-9]+
      | _PORT(?:_[0-9]+_(?:TCP|UDP|SCTP))?=(?:tcp|udp|sctp)://.*
      | _PORT_[0-9]+_(?:TCP|UDP|SCTP)_(?:PROTO=(?:tcp|udp|sctp)|PORT=[0-9]+|ADDR=[\w.:-]+)
    )""",
    re.VERBOSE,
)
"""A variable by which Kubernetes announces a Service to a pod, and Docker a linked container."""

DOCKER_LINK = re.compile(r"(?P<name>\w+?)(?:_NAME=/.*|_ENV_\w+=.*)", re.DOTALL)
"""A further variable of Docker."""

ELSEWHERE = frozenset({"BEATLESS_TOKEN", "BEATLESS_API_URL"})
"""Names that the HTTP client and the command line read, and an app does not."""


SEVERAL_HOSTS = re.compile(
    r"(?P<start>[a-z+]+://(?:[^/?#]*@)?)(?P<hosts>[^@/?#]*,[^@/?#]*)(?P<rest>(?:[/?#].*)?)",
    re.DOTALL,
)
PLACEHOLDER = "several.hosts.invalid"

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\],]+)(:\d+)?")
SOCKET_OR_HOST = re.compile(r"[/@][^,]*|[^:,/]+|[0-9a-fA-F]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*")

TARGETS = ("read-write", "primary", "any")
"""Of libpq's `target_session_attrs`: with another one nothing could be written."""

FILES = re.compile(
    "([?&](?:sslrootcert|sslcert|sslkey|sslcrl|sslcrldir|passfile|ssl_ca_certs|ssl_certfile|ssl_keyfile)=)"
    "([^&;]+)"
)
"""Options of URLs that name a file, of libpq and of redis-py."""

SEVERAL = "postgresql://user:password@one.example:5432,two.example:5432/app"


def _setting(example: str, parse: Callable[[str], Any] = str, **options: Any) -> Any:
    return field(metadata={"example": example, "parse": parse}, **options)


_WORDS = (
    "all analyse analyze and any array as asc asymmetric authorization binary both case "
    "cast check collate collation column concurrently constraint create cross "
    "current_catalog current_date current_role current_schema current_time "
    "current_timestamp current_user default deferrable desc distinct do else end except "
    "false fetch for foreign freeze from full grant group having ilike in initially inner "
    "intersect into is isnull join lateral leading left like limit localtime "
    "localtimestamp natural not notnull null offset on only or order outer overlaps "
    "placing primary references returning right select session_user similar some "
    "symmetric system_user table tablesample then to trailing true union unique user "
    "using variadic verbose when where window with "
)
RESERVED = frozenset(_WORDS.split())
"""Words of SQL that name a schema only in quotes, which no statement of ours writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The addresses of the servers, the limits and the times of an app.

    Each is a keyword and `BEATLESS_<NAME>` in the environment. Raises BadSetting, which names the
    variable, the problem and an example.

    >>> from beatless import Settings
    >>> settings = Settings.from_env(
    ...     {
    ...         "BEATLESS_DATABASE_URL": "postgresql://shop@db.example/shop",
    ...         "BEATLESS_REDIS_URL": "redis://redis.example:6379/0",
    ...     },
    ...     lease_seconds=60,
    ... )
    >>> settings.lease_seconds, settings.schema
    (60, 'beatless')
    """

    database_url: str = _setting("postgresql://user:password@db.example/app")
    listen_url: str = _setting("postgresql://user:password@db-direct.example/app", default="")
    """A direct connection for the relay, when `database_url` goes through a pooler."""
    redis_url: str = _setting("redis://:password@redis.example:6379/0")
    broker_url: str = _setting("amqp://user:password@rabbit.example//", default="")
    """Default: `redis_url`."""
    database_password_command: str = _setting("aws rds generate-db-auth-token …", default="")
    """Prints the password of both Postgres URLs; run at each connect."""
    redis_password_command: str = _setting("/usr/local/bin/redis-password", default="")
    broker_password_command: str = _setting("/usr/local/bin/broker-password", default="")
    """Default: that of Redis, if the broker is the same."""
    database_password: Password | None = None
    """Gives the password instead of a command; a keyword only, as the next two."""
    redis_password: Password | None = None
    broker_password: Password | None = None
    schema: str = _setting("beatless", default="beatless")
    prefix: str = _setting("beatless", default="beatless")
    """Starts the name of every queue, channel and key."""
    app: str = _setting("myproject.app:app", default="")
    lease_seconds: float = _setting("30", float, default=30.0)
    """How long a dead worker's run waits for another worker."""
    redispatch_seconds: float = _setting("15", float, default=15.0)
    """How long a sent message may stay unclaimed before it is sent again."""
    grace_seconds: float = _setting("20", float, default=20.0)
    """How long a stopping worker lets its steps go on."""
    worker_group_runs: int = _setting("64", int, default=64)
    """How many runs of short steps a process of a worker executes at once; 1: one by one."""
    max_event_bytes: int = _setting("262144", int, default=262_144)
    max_queues: int = _setting("1000", int, default=1000)
    """In how many queues the unfinished runs of one namespace may be, beside those of the plans."""
    retention_days: float = _setting("30", float, default=30.0)
    """How long the events of an ended run are kept; 0: for ever."""
    run_retention_days: float = _setting("365", float, default=365.0)
    """How much longer the run itself is kept: state, result, error, key; 0: for ever."""
    metrics_port: int | None = _setting("9464", int, default=None)
    """Where relays and workers serve /metrics; default: nowhere. 0 takes a free port."""
    metrics_host: str = _setting("0.0.0.0", default="127.0.0.1")  # noqa: S104 - an example
    log_format: str = _setting("json", default="text")
    """How log lines look: text for people, json for machines."""
    fault: str = _setting("step.before@1:kill", default="")
    """Crash points for tests of recovery; see beatless.outbox.faults."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("schema", "prefix"):
            if not NAME.fullmatch(value := getattr(self, name)):
                self._refuse(name, f"is {value!r}, which does not match ^{NAME.pattern}$")
        if self.schema in RESERVED or self.schema.startswith("pg_"):
            self._refuse("schema", f"is {self.schema!r}, a word that SQL or Postgres has reserved")
        for name in (
            "lease_seconds",
            "redispatch_seconds",
            "grace_seconds",
            "worker_group_runs",
            "max_event_bytes",
            "max_queues",
        ):
            if not 0 < (number := getattr(self, name)) < MOST_S:
                problem = f"is {number!r}, which is not a number above 0 and below {MOST_S:.0f}"
                self._refuse(name, problem)
        if self.max_event_bytes < LEAST_EVENT_BYTES:
            problem = (
                f"is {self.max_event_bytes}, below {LEAST_EVENT_BYTES}: our own events need that"
            )
            self._refuse("max_event_bytes", problem)
        for name in ("retention_days", "run_retention_days"):
            if not 0 <= (number := getattr(self, name)) < MOST_DAYS:
                problem = f"is {number!r}, which is not a number of days; 0 is for ever"
                self._refuse(name, f"{problem}, and less than {MOST_DAYS} are counted")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            self._refuse("metrics_port", f"is {self.metrics_port}, which is not a port")
        if self.log_format not in ("text", "json"):
            self._refuse("log_format", f"is {self.log_format!r}, which is neither text nor json")
        for name in ("database_url", "listen_url"):
            if (value := getattr(self, name)) or name == "database_url":
                self._check_postgres(name, value)
        self._check_redis("redis_url", self.redis_url)
        if self.broker_url.startswith(REDIS):
            self._check_redis("broker_url", self.broker_url)
        for name in ("database", "redis", "broker"):
            try:
                shlex.split(getattr(self, f"{name}_password_command"))
            except ValueError as error:
                self._refuse(f"{name}_password_command", f"is no command: {error}")
        try:
            CrashPoints(self.fault)
        except ValueError as error:
            self._refuse("fault", f"is wrong: {error}")
        for name in ("database_url", "listen_url", "redis_url", "broker_url"):
            object.__setattr__(self, name, _with_absolute_files(getattr(self, name)))
        object.__setattr__(self, "listen_url", self.listen_url or self.database_url)
        object.__setattr__(self, "broker_url", self.broker_url or self.redis_url)

    def _check_types(self) -> None:
        for entry in variables(type(self)):
            value, parse = getattr(self, entry.name), entry.metadata["parse"]
            if value is None and entry.default is None:
                continue
            text = parse not in (int, float)
            if not (isinstance(value, str) if text else is_number(value)):
                wanted = "text" if text else "a number"
                self._refuse(entry.name, f"is a {type(value).__name__}, and must be {wanted}")

    def _check_redis(self, name: str, value: str) -> None:
        try:
            RedisUrl.parse(value)
        except ValueError as error:
            self._refuse(name, str(error))

    def _check_postgres(self, name: str, value: str) -> None:
        try:
            url = engine_url(value)
        except ArgumentError:
            self._refuse(name, "is not a URL" if value else "is empty")
        except ValueError:
            self._refuse(name, "has a port that is not a number")
        drivername = value.partition("://")[0]
        if drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
            driver = drivername.partition("+")[2]
            also = f": the driver is psycopg 3, not {driver}" if driver else ""
            self._refuse(name, f"starts with {drivername}://, not with postgresql://{also}")
        if "@" in (url.host or ""):
            self._refuse(name, "has more than one @: write that of a user or password as %40")
        if url.query and (problem := _problem_with_options(value)):
            self._refuse(name, problem)
        target = url.query.get("target_session_attrs", "any")
        if target not in TARGETS:
            problem = f"has target_session_attrs={target}, where nothing can be written: choose "
            self._refuse(name, problem + " or ".join(TARGETS))
        several = SEVERAL_HOSTS.fullmatch(value)
        if several is not None:
            for host in several["hosts"].split(","):
                if not HOST.fullmatch(host):
                    self._refuse(name, f"has {host!r} among its hosts, which is not host:port")
        else:
            hosts = url.normalized_query.get("host", ())
            one = len(hosts) <= 1 and all(SOCKET_OR_HOST.fullmatch(host) for host in hosts)
            if not one or any("," in port for port in url.normalized_query.get("port", ())):
                self._refuse(
                    name,
                    "names several hosts, or a port, in ?host=, which libpq and SQLAlchemy read "
                    f"differently: write them as {SEVERAL}",
                )

    def _refuse(self, name: str, problem: str) -> NoReturn:
        examples = {entry.name: entry.metadata["example"] for entry in variables(type(self))}
        raise BadSetting(f"BEATLESS_{name.upper()}", problem, examples[name])

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Read BEATLESS_* (default: this process's environment); keyword arguments win.

        Raises BadSetting, with an example, for unknown names, missing ones and bad values, and
        TypeError for an `environ` that is no mapping and for a keyword that is no setting.
        """
        keywords = [entry.name for entry in fields(cls)]
        for name in sorted(overrides.keys() - set(keywords)):
            near = get_close_matches(name, keywords, n=1)
            meant = f": did you mean {near[0]}?" if near else ""
            raise TypeError(f"Settings have no {name}{meant}")
        if environ is not None and not isinstance(environ, Mapping):
            raise TypeError(
                f"environ is {type(environ).__name__}: give a mapping of names to texts, as "
                "os.environ, or nothing for that one"
            )
        source = os.environ if environ is None else environ
        known = {f"BEATLESS_{entry.name.upper()}": entry for entry in variables(cls)}
        links = service_links(source)
        given = {
            name: value
            for name, value in source.items()
            if name.startswith("BEATLESS_") and name not in links
        }
        for name in sorted(given.keys() - known.keys() - ELSEWHERE):
            near = get_close_matches(name, [*known, *ELSEWHERE], n=1, cutoff=0.8)
            meant = f", or did you mean {near[0]}?" if near else ""
            raise BadSetting(name, f"is not a setting of beatless; remove it{meant}", "")
        values: dict[str, Any] = {}
        for name, entry in known.items():
            text = given.get(name, "")
            if entry.name in overrides or not text:
                continue
            try:
                values[entry.name] = entry.metadata["parse"](text)
            except ValueError:
                problem = f"is {text!r}, which is not a number"
                raise BadSetting(name, problem, entry.metadata["example"]) from None
        values |= overrides
        for name in ("database_url", "redis_url"):
            if name not in values:
                variable = f"BEATLESS_{name.upper()}"
                raise BadSetting(variable, "is not set", known[variable].metadata["example"])
        return cls(**values)

    def to_env(self) -> dict[str, str]:
        """The settings as environment variables, for a process of the same app."""
        return {
            f"BEATLESS_{entry.name.upper()}": str(value)
            for entry in variables(type(self))
            if (value := getattr(self, entry.name)) not in ("", None)
        }

    @property
    def redis(self) -> RedisUrl:
        """The Redis of the live events."""
        return replace(RedisUrl.parse(self.redis_url), credentials=self.password("redis"))

    def password(self, server: str) -> Password | None:
        """The source of the password of `database`, `redis` or `broker`, if it changes."""
        given: Password | None = getattr(self, f"{server}_password")
        command: str = getattr(self, f"{server}_password_command")
        if given is None and command:
            given = from_command(command)
        if given is None and server == "broker" and self.broker_url == self.redis_url:
            given = self.password("redis")
        return given

    @property
    def redis_broker(self) -> RedisUrl | None:
        """The broker, if it is a Redis."""
        if not self.broker_url.startswith(REDIS):
            return None
        return replace(RedisUrl.parse(self.broker_url), credentials=self.password("broker"))

    @property
    def pooled(self) -> bool:
        """Whether `database_url` seems to go through a pooler: prepared statements are off then."""
        return self.listen_url != self.database_url

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{entry.name}={redact(getattr(self, entry.name))!r}" for entry in fields(self)
        )
        return f"Settings({shown})"


def service_links(environ: Mapping[str, str]) -> frozenset[str]:
    """The variables by which Kubernetes and Docker announce other services.

    A Service called beatless-metrics makes BEATLESS_METRICS_PORT=tcp://…: not a setting of ours.
    """
    found, linked = set(), set()
    for name, value in environ.items():
        if match := LINK.fullmatch(f"{name}={value}"):
            found.add(name)
            linked.add(match["name"])
    for name, value in environ.items():
        match = DOCKER_LINK.fullmatch(f"{name}={value}")
        if match and match["name"] in linked:
            found.add(name)
    return frozenset(found)


def variables(cls: type[Settings]) -> list[Field[Any]]:
    """The settings that the environment has too."""
    return [entry for entry in fields(cls) if entry.metadata]


def redact(value: Any) -> Any:
    """A URL without its passwords; anything else unchanged."""
    if isinstance(value, str) and "://" in value:
        # To the last @ of each: a password may have one. Rather too much than too little.
        value = re.sub(r"(://[^:/@;]*):[^;]*@", r"\1:***@", value)
        return re.sub(r"(password=)[^&;]*", r"\1***", value)
    return value


def _with_absolute_files(url: str) -> str:
    """The URL whose files are found from any directory: bodies of steps may change it."""

    def absolute(option: re.Match[str]) -> str:
        path = Path(unquote(option[2]))
        if str(path) == "system":  # not a file, but its authorities
            return option[0]
        return option[1] + quote(str(path.absolute()))

    return FILES.sub(absolute, url)


def engine_url(url: str) -> URL:
    """The URL for SQLAlchemy, on the psycopg driver. It names several hosts in a way of its own."""
    found = SEVERAL_HOSTS.fullmatch(url)
    if found is None:
        one = make_url(url).set(drivername="postgresql+psycopg")
        if one.host and one.host[:3].lower() == "%2f":  # a directory of sockets, as libpq has it
            one = one.set(host="").update_query_dict({"host": unquote(one.host)})
        return one
    plain = make_url(f"{found['start']}{found['rest']}").set(drivername="postgresql+psycopg")
    return plain.update_query_dict({"host": found["hosts"].split(",")})


def _problem_with_options(url: str) -> str:
    """What libpq says of the options of a URL; "" if it takes them."""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        conninfo_to_dict(libpq_url(url))
    except ProgrammingError as error:
        return f"has options that libpq does not take: {str(error).strip()}"
    return ""


def libpq_url(url: str | URL) -> str:
    """The URL for psycopg itself. Of several hosts the primary, unless it names other targets."""
    several = SEVERAL_HOSTS.fullmatch(url) if isinstance(url, str) else None
    if several is not None:
        text = libpq_url(f"{several['start']}{PLACEHOLDER}{several['rest']}")
        text = text.replace(PLACEHOLDER, several["hosts"], 1)
        if "target_session_attrs" in text:
            return text
        return f"{text}{'&' if '?' in text else '?'}target_session_attrs=primary"
    found = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    # SQLAlchemy writes a space as itself before the query and as + in it; libpq reads neither.
    address, mark, query = found.partition("?")
    return address.replace(" ", "%20") + mark + query.replace("+", "%20")
