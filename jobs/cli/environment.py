"""The environment of a command: the app, its settings, and its output."""

import gc
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from beatless.errors import BadRequest, BadSetting, JobsError
from beatless.namespaces import DEFAULT_NAMESPACE, namespace_of
from beatless.orchestrator.errors import OrchestratorError
from beatless.orchestrator.outcomes import PlanError
from beatless.outbox.message import escape_line_ends

# Imported at run time where they are used: most of the time to start is theirs.
if TYPE_CHECKING:
    from rich.console import Console

    from beatless.app import App
    from beatless.client import Client

APP_EXAMPLE = "myproject.app:app"

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


NO_SERVERS = {
    "BEATLESS_DATABASE_URL": "postgresql://no-server-is-needed.invalid/",
    "BEATLESS_REDIS_URL": "redis://no-server-is-needed.invalid/0",
}
"""For an app that is only looked at. Error messages show the host."""


@contextmanager
def importing() -> Iterator[None]:
    """Keeps the garbage collector away from objects that are imported in this block, which stay.

    It looked at all of them several times, and once more when the process ended: a third of the
    time of most commands. Where all is imported already, as in tests, it changes nothing.
    """
    enabled, imported = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if len(sys.modules) > imported:
                gc.freeze()
            gc.enable()


class Environment:
    """Made once for each command; loads the app when the command first asks for it."""

    def __init__(self) -> None:
        self.as_json = False
        self.named: str | None = None
        """The app as the command line names it."""
        self.namespace = DEFAULT_NAMESPACE
        """Whose runs the command starts and lists."""
        self.needs_servers = True
        """False: the app may be loaded without settings, for its servers are not asked."""
        self._app: App | None = None
        self._restore_logs: Callable[[], None] | None = None

    @cached_property
    def err(self) -> "Console":
        """For the person: standard error."""
        return console(stderr=True)

    @cached_property
    def _out(self) -> "Console":
        return console(stderr=False)

    @property
    def out(self) -> "Console":
        """For the person: standard output, unless that is for JSON."""
        return self.err if self.as_json else self._out

    @property
    def app(self) -> "App":
        """The named app, or one with the demo plans.

        Without settings in the environment, a `beatless dev` of this directory gives them.
        Raises BadSetting.
        """
        if self._app is None:
            with importing():
                self._app = self._loaded()
        return self._app

    def _loaded(self) -> "App":
        from beatless.app import App
        from beatless.demo import PLANS
        from beatless.settings import Settings

        self.find_settings()
        name = self.named or os.environ.get("BEATLESS_APP", "")
        try:
            if not name:
                return App(Settings.from_env(), PLANS)
            return load(name, "--app" if self.named else "BEATLESS_APP")
        except BadSetting as error:
            raise explained(error) from error

    def find_settings(self) -> None:
        """Give this process the settings of a `beatless dev` of this directory, if it has none.

        For the user's own modules too: they read them when they are imported.
        """
        from beatless.local.stack_file import DJANGO_SETTINGS, settings_of_running

        if not os.environ.get("BEATLESS_DATABASE_URL"):
            found = settings_of_running(Path.cwd(), self.note)
            if os.environ.get(DJANGO_SETTINGS):  # of the person, or of manage.py
                found.pop(DJANGO_SETTINGS, None)
            os.environ.update(found)
        if not self.needs_servers:
            os.environ.update({n: url for n, url in NO_SERVERS.items() if not os.environ.get(n)})

    @property
    def client(self) -> "Client":
        """The client for values that the command prints."""
        return self.app.client_for(self.namespace, shown=True)

    def client_of(self, run_id: str) -> "Client":
        """The client that sees this run: a whole id, as `acme~order-1`, names its namespace."""
        if "~" not in run_id:
            return self.client
        return self.app.client_for(namespace_of(run_id), shown=True)

    def check_app_exists(self) -> None:
        """Raise BadSetting if the package of the named app is not there, before anything starts."""
        if self.app_name:
            check_exists(self.app_name, "--app" if self.named else "BEATLESS_APP")

    @property
    def app_name(self) -> str:
        """The environment variables by which another process finds the same app."""
        return self.named or os.environ.get("BEATLESS_APP", "")

    def close(self) -> None:
        """Close the connections of the app."""
        if self._app is not None:
            self._app.close()
        if self._restore_logs is not None:
            self._restore_logs()

    def document(self, value: Any) -> None:
        """One JSON document on stdout, with times as ISO 8601."""
        text = json.dumps(value, ensure_ascii=False, default=datetime.isoformat)
        click.echo(escape_line_ends(text))

    def note(self, text: str) -> None:
        """Something for the person, never part of the output."""
        self.err.print(text)

    def note_other_namespaces(self, shown: str) -> None:
        """Tell where else there are runs, to a person who was shown nothing."""
        if others := self.other_namespaces():
            self.note(
                f"these are the {shown} of namespace {self.namespace}; there are runs in others, "
                f"as --namespace {others[0]}"
            )

    def other_namespaces(self) -> list[str]:
        """Namespaces that have runs, at most two, beside that of the command."""
        from beatless.namespaces import namespaces_beside
        from beatless.transactions import reaching_postgres

        schema, engine = self.app.settings.schema, self.app.engine
        with reaching_postgres(schema, engine), engine.connect() as connection:
            return namespaces_beside(connection, schema, self.namespace)

    def log(self) -> None:
        """Log lines to stderr, for the commands that run for long. Loads the app."""
        from beatless.observe import logs

        self._restore_logs = logs.configure(self.app.settings.log_format, sys.stderr)


def console(*, stderr: bool) -> "Console":
    """A console without emoji codes: values of runs are shown as they are."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)


class AppFailed(JobsError):
    """The module of the named app raises an error when it is imported."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} cannot be imported: {self.reason}"


def explained(error: BadSetting) -> BadSetting:
    """With the other sources of a setting that is missing."""
    if error.problem != "is not set":
        return error
    problem = f"{error.problem}, and no `beatless dev` runs in this directory"
    if os.environ.get("BEATLESS_DATABASE_URL"):
        problem = f"{error.problem}; BEATLESS_DATABASE_URL is, so no `beatless dev` is asked"
    return BadSetting(error.name, problem, error.example)


def project_module(name: str) -> ModuleType:
    """A module of the project in the current directory, or of an installed package.

    Raises ModuleNotFoundError if it is not there, AppFailed if it fails, and those errors of
    beatless that it raises itself, each of which has its advice.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (JobsError, OrchestratorError, PlanError):
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise
        raise AppFailed(name, f"{type(error).__name__}: {error}") from error


def named_app(name: str, given: str) -> tuple[str, str]:
    """The module and the attribute of `module:attribute`. Raises BadSetting."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise BadSetting(given, f"is {name!r}, which is not module:attribute", APP_EXAMPLE)
    return module_name, attribute


def no_module(name: str, given: str) -> BadSetting:
    """The error of an app whose module is not there."""
    problem = f"names the module {name}, which cannot be found from {Path.cwd()}"
    return BadSetting(given, problem, APP_EXAMPLE)


def check_exists(name: str, given: str) -> None:
    """Raise BadSetting if the package of the app is not there. Imports nothing of the project."""
    module_name, _ = named_app(name, given)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    package = module_name.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise no_module(module_name, given)


def load(name: str, given: str) -> "App":
    """The app at `module:attribute`. Raises BadSetting, of the setting `given`, and AppFailed."""
    from beatless.app import App

    module_name, attribute = named_app(name, given)
    try:
        found: Any = project_module(module_name)
    except ModuleNotFoundError as error:
        raise no_module(module_name, given) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            problem = f"names {name}, but {module_name} has no {attribute}"
            raise BadSetting(given, problem, APP_EXAMPLE)
        found = getattr(found, part)
    if not isinstance(found, App):
        problem = f"names {name}, which is a {type(found).__name__} and not an App"
        if hasattr(found, "send_task"):
            problem += f"; it is a Celery app, and the App is what `App(…)` gave in {module_name}"
        raise BadSetting(given, problem, APP_EXAMPLE)
    return found


def seconds(text: str) -> float:
    """`30s`, `5m`, `2h`, `7d`, or a number of seconds. Raises BadRequest."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)?", text)
    if not found:
        raise BadRequest("duration", f"is {text!r}; write it like 30s, 5m, 2h or 7d")
    return float(found[1]) * SECONDS[found[2] or "s"]


def moment(text: str) -> datetime:
    """An ISO 8601 time; without a zone it is UTC. Raises BadRequest."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest("time", f"is {text!r}; write it like 2026-12-24T18:00:00+01:00") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def json_input(text: str | None, option: str = "--input") -> Any:
    """JSON text, `@FILE`, or `-` for standard input. Raises BadRequest, naming the option."""
    if text is None:
        return None
    where = option
    if text == "-" or text.startswith("@"):
        where = "standard input" if text == "-" else text[1:]
        try:
            text = sys.stdin.read() if text == "-" else Path(where).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(option, f"cannot be read from {where}: {error}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequest(
            where, f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except RecursionError:
        raise BadRequest(where, "is nested too deeply") from None


def pairs(values: tuple[str, ...]) -> dict[str, str]:
    """`k=v` options as a dict. Raises BadRequest."""
    found = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not name or not equals:
            raise BadRequest("tag", f"is {value!r}; write it like customer=42")
        found[name] = content
    return found
