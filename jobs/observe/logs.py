"""Log lines of a whole process in one form: for people, or one JSON object for each line.

Lines that are written while a step runs, your own ones too, carry the run, step, attempt and trace
they belong to. Input, results and passwords in URLs are in none of our own.
"""

import json
import logging
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, TextIO

from beatless.orchestrator.failure import MOST_FRAMES
from beatless.orchestrator.lease import Lease
from beatless.outbox.message import escape_line_ends

logger = logging.getLogger(__name__)

CONTEXT: ContextVar[Mapping[str, Any]] = ContextVar("beatless_log_context")

RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes of every log record; any other was given by its writer as a fact."""

URL_PASSWORD = re.compile(r"(://[^:/@\s]*:)(?:(?!://)\S)+@")
"""To the last @ before the next URL: a password may have one. Rather too much than too little."""

PASSWORD = re.compile(
    r"""(\b\w*passw(?:or)?d(?:\s*=\s*|\\*['"]\s*:\s*))  # name=value, or a member of a dict or JSON
    (?: b?'(?:[^'\\]|\\.)*'
      | b?"(?:[^"\\]|\\.)*"
      | (?: (?! &\w+= | ['"](?:[\s,;:)\]}]|$) ) \S )+   # up to the next option, or a closing quote
    )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)

QUIET_LOGGERS = ("celery.app.trace", "celery.worker.strategy", "alembic", "httpx")
"""Loggers whose lines below a warning repeat ours: one for each change of a run."""

OWN_LOGGERS = ("beatless", "pytest_beatless")
LIBRARY_LOGGERS = ("celery", "kombu", "billiard", "amqp", "uvicorn")
"""The libraries that our processes consist of beside our own packages."""


KEEPING: list[Callable[[], None]] = []
"""Called when an attempt or a claim ends: what was imported in it may have configured logging."""


class Format(StrEnum):
    """The formatter of log lines."""

    TEXT = "text"
    JSON = "json"


def configure(form: str, stream: TextIO, level: int = logging.INFO) -> Callable[[], None]:
    """Write everything that this process logs to the stream, warnings and Celery's lines too.

    A worker does it again after its start, in its children as well: projects configure logging
    there, and Celery's Django fix-up does it a second time. That disables loggers which the project
    has made in between; they are enabled again. So it does after a step that took our handler away.

    Gives the function that puts everything back as it was.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if form == Format.JSON else TextLines())
    root = logging.getLogger()
    handlers = root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    root_level = root.level
    known = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    enabled = [each for each in known if not each.disabled]

    def apply(**_: Any) -> None:
        root.handlers[:] = [handler]
        root.setLevel(level)
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        for each in enabled:
            each.disabled = False
        enable_own_loggers(*LIBRARY_LOGGERS)

    def keep() -> None:
        if handler not in root.handlers or logger.disabled:
            apply()

    apply()
    KEEPING.append(keep)
    logging.captureWarnings(capture=True)
    from celery import signals  # here, because every app imports this module

    # Celery leaves logging alone as soon as the first has a receiver. It comes after `worker_init`.
    for sent in (signals.setup_logging, signals.worker_process_init):
        sent.connect(apply)

    def restore() -> None:
        KEEPING.remove(keep)
        for sent in (signals.setup_logging, signals.worker_process_init):
            sent.disconnect(apply)
        root.handlers[:] = handlers
        root.setLevel(root_level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        logging.captureWarnings(capture=False)

    return restore


def enable_own_loggers(*others: str) -> None:
    """Enable the loggers of our packages, and these others, after a project's `dictConfig`.

    By default, that disables every logger it does not name. Levels, handlers and
    propagation that it did set stay.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in (*OWN_LOGGERS, *others):
            logger.disabled = False


class LogScope:
    """Around the work on a run, and around each attempt: whose lines these are.

    Goes around another scope, and gives what that gives. Not by `contextmanager`, which would cost
    each step as much again.
    """

    __slots__ = ("_before", "_facts", "_inner")

    def __init__(
        self,
        lease: Lease,
        step: str | None,
        attempt: int,
        inner: AbstractContextManager[str | None],
    ) -> None:
        facts: dict[str, Any] = {"run_id": lease.run.run_id}
        if (trace_id := trace_of(lease.trace_context)) is not None:
            facts["trace_id"] = trace_id
        if step is not None:
            facts |= {"step": step, "attempt": attempt}
        self._facts, self._inner = facts, inner

    def __enter__(self) -> str | None:
        self._before = CONTEXT.set(self._facts)
        try:
            return self._inner.__enter__()
        except BaseException:
            CONTEXT.reset(self._before)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, traceback)
        finally:
            CONTEXT.reset(self._before)
            for keep in KEEPING:
                keep()


def trace_of(context: Mapping[str, str] | None) -> str | None:
    """The id of the trace that a run belongs to."""
    parts = (context or {}).get("traceparent", "").split("-")
    return parts[1] if len(parts) == 4 else None


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """The facts of a line beside its message. Only plain values: a structure may hold payloads."""
    given = {
        name: value
        for name, value in vars(record).items()
        if name not in RECORD_ATTRIBUTES and isinstance(value, (str, int, float, bool, type(None)))
    }
    return {**CONTEXT.get({}), **given}


def masked(text: str) -> str:
    """Without the passwords of URLs, connection strings and dicts."""
    if "://" in text:
        text = URL_PASSWORD.sub(r"\1***@", text)
    if "passw" in text.casefold():  # in all that the expression could find, and a little more
        text = PASSWORD.sub(r"\1***", text)
    return text


class _Lines(logging.Formatter):
    """Log lines whose tracebacks have a limit, as those of failures that are stored."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "".join(traceback.format_exception(*ei, limit=-MOST_FRAMES)).rstrip("\n")


class JsonLines(_Lines):
    """One JSON object a line: ts, level, logger, message, then the facts.

    >>> import logging
    >>> from beatless import JsonLines
    >>> record = logging.makeLogRecord({"name": "shop", "msg": "charged", "amount": 3})
    >>> JsonLines().format(record)
    '{"ts": "...", "level": "...", "logger": "shop", "message": "charged", "amount": 3}'
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": masked(record.getMessage()),
        }
        for name, value in facts_of(record).items():
            line.setdefault(name, masked(value) if isinstance(value, str) else value)
        if record.exc_info:
            line["exception"] = masked(self.formatException(record.exc_info))
        if record.stack_info:
            line["stack"] = masked(record.stack_info)
        return escape_line_ends(json.dumps(line, ensure_ascii=False, default=str))


class TextLines(_Lines):
    """The time, level, logger and message, then the facts as name=value.

    >>> import logging
    >>> from beatless import TextLines
    >>> record = logging.makeLogRecord({"name": "shop", "msg": "charged", "amount": 3})
    >>> TextLines().format(record)
    '... shop  charged  amount=3'
    """

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(" ", "milliseconds")[:23]
        facts = "".join(
            f"  {name}={value:.6g}" if isinstance(value, float) else f"  {name}={value}"
            for name, value in facts_of(record).items()
            if value is not None and name != "action"
        )
        text = f"{when} {record.levelname:<7} {record.name}  {record.getMessage()}{facts}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return masked(text)
