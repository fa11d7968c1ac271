"""The Celery app of the fleet: configured by our settings, deaf to the environment.

A container often has the variables of another Celery project, and of a command line that is not
ours: `CELERY_BROKER_URL`, `BROKER_URL`, `APP` and many more. Celery prefers them to an app's
settings, so that workers would silently consume from another broker.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click
from celery import Celery, _state
from celery.app.utils import Settings as CelerySettings
from celery.loaders.app import AppLoader
from kombu import Connection
from kombu.connection import ConnectionPool

from beatless.credentials import Password, ask
from beatless.errors import JobsError

logger = logging.getLogger("beatless.celery_app")

IGNORED = (
    "BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_CONFIG_MODULE",
    "CELERY_LOADER",
    "CELERY_RESULT_BACKEND",
    "CONFIG_MODULE",
    "LOADER",
    "REMAP_SIGTERM",
    "RESULT_BACKEND",
)
"""Variables that would override the settings of a Celery app, or end its steps without a grace."""

ALWAYS_EAGER = ("task_always_eager", "celery_always_eager")
"""Names of the setting by which tasks are executed where they are sent."""

COMMAND = "CELERY_WORKER_"
"""Starts the variables by which `celery worker` takes options from the environment."""


class ConfiguredElsewhere(JobsError):
    """A caller configures the Celery app of beatless, which its settings do."""

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call

    def __str__(self) -> str:
        return (
            f"{self.call} is for a Celery app of your own: that of beatless is configured by "
            "Settings alone; see docs/two-celeries.md"
        )


class Configuration(CelerySettings):  # type: ignore[misc]  # Celery has no types
    """Celery's configuration without its looks at the environment.

    Raises ConfiguredElsewhere for `task_always_eager`: a relay would execute the runs itself.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        _refuse_eager(key, value)
        super().__setitem__(key, value)

    def update(self, *given: Any, **named: Any) -> None:
        changes = dict(*given, **named)
        for key, value in changes.items():  # Celery's own goes past `__setitem__`
            _refuse_eager(key, value)
        super().update(changes)

    @property
    def broker_url(self) -> Any:
        return self.first("broker_url", "broker_host")

    @property
    def broker_read_url(self) -> Any:
        return self.get("broker_read_url") or self.broker_url

    @property
    def broker_write_url(self) -> Any:
        return self.get("broker_write_url") or self.broker_url

    @property
    def result_backend(self) -> Any:
        return self.first("result_backend", "CELERY_RESULT_BACKEND")


def _refuse_eager(key: object, value: Any) -> None:
    if value and str(key).lower() in ALWAYS_EAGER:
        raise ConfiguredElsewhere(str(key))


class Loader(AppLoader):  # type: ignore[misc]  # Celery has no types
    """Reads no module that the environment names."""

    def read_configuration(self, env: str = "") -> dict[str, Any]:  # noqa: ARG002 - Celery's
        return {}


class FleetCelery(Celery):  # type: ignore[misc]  # Celery has no types
    """Celery as this app's settings configure it, independent of the environment."""

    events_cls = "beatless.worker.task_events:HeardEvents"
    _made = False

    def __init__(self, main: str) -> None:
        super().__init__(main, set_as_current=False, loader=f"{__name__}:{Loader.__qualname__}")
        self._made = True
        # Celery offers no place for a class of ours. The object is the same for good, and a plain
        # assignment to it would be a setting.
        object.__setattr__(self._conf, "__class__", Configuration)
        for command in ("worker", "beat", "events"):
            self.user_options[command].add(
                click.Option(
                    ["--beatless"],
                    is_flag=True,
                    is_eager=True,
                    hidden=True,
                    expose_value=False,
                    callback=_forget_environment,
                )
            )

    def set_current(self) -> None:
        """As Celery's, unless the project has an app of its own.

        Celery makes a worker's app the current one. Shared tasks of the project that a step calls
        would be published to our broker then.
        """
        if _app_of_project() is None:
            super().set_current()

    def set_default(self) -> None:
        """As `set_current`, for all threads, and never by the mere making of the app.

        Celery's Django fix-up does that with the first app that is made.
        """
        if self._made:
            _state.set_default_app(_app_of_project() or self)

    def config_from_object(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfiguredElsewhere("config_from_object")

    def config_from_envvar(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfiguredElsewhere("config_from_envvar")

    def start(self, argv: Sequence[str] | None = None) -> Any:
        """Celery's command line on these arguments."""
        with _without_variables():
            return super().start(argv)


def _app_of_project() -> Celery | None:
    """The app that shared tasks belong to, if the project has made one."""
    for app in (_state._tls.current_app, _state.default_app):
        # `default` is the app that Celery itself makes on demand.
        if app is not None and not isinstance(app, FleetCelery) and app.main != "default":
            return app
    return None


def _forget_environment(context: click.Context, _option: click.Parameter, given: bool) -> bool:
    """The options that come after this one are not looked for in the environment."""
    if isinstance(getattr(context.obj, "app", None), FleetCelery):
        context.auto_envvar_prefix = None
    return given


@contextmanager
def _without_variables() -> Iterator[None]:
    """Celery's global options come from its arguments, not from APP, BROKER_URL, NO_COLOR …"""
    command = importlib.import_module("celery.bin.celery").celery  # a fifth of a second
    before = [(option, option.envvar) for option in command.params]
    for option in command.params:
        option.envvar = None
    try:
        yield
    finally:
        for option, variable in before:
            option.envvar = variable


def warn_of_foreign(environ: Mapping[str, str], broker_url: str) -> None:
    """Log the variables of another Celery that are set and ignored."""
    found = [
        name
        for name, value in sorted(environ.items())
        if value and (name in IGNORED or name.startswith(COMMAND)) and value != broker_url
    ]
    if found:
        # In the message, because Celery's own command shows nothing else.
        logger.warning(
            "variables of another Celery are ignored, the settings of beatless decide: %s",
            " ".join(found),
            extra={"action": "foreign_variables"},
        )


def asking(password: Password) -> type[Connection]:
    """kombu's connections, with a password that is asked for whenever one is made."""

    class Asking(Connection):  # type: ignore[misc]  # kombu has no types
        def _establish_connection(self) -> Any:
            self.password = ask(password, ConnectionError)
            return super()._establish_connection()

        def Pool(self, limit: int | None = None, **options: Any) -> Any:  # noqa: N802 - kombu's
            return AskingPool(self, limit, **options)

    class AskingPool(ConnectionPool):  # type: ignore[misc]  # kombu has no types
        def new(self) -> Any:
            made = super().new()
            if not isinstance(made, Asking):  # kombu 5.7 makes them of a class of its own
                establish = made._establish_connection

                def with_password() -> Any:
                    made.password = ask(password, ConnectionError)
                    return establish()

                made._establish_connection = with_password
            return made

    return Asking
