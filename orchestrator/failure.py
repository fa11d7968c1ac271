"""Stored errors of a run: the exception of a step's body, or its cancel.

The class is the user's, and so may be every attribute of it: to describe it never raises.
"""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

MESSAGE_LIMIT = 2000
"""Characters of an error's message that are kept: its beginning."""

TRACEBACK_LIMIT = 4000
"""Characters of a traceback that are kept with a failure: its end, where the reason is."""

MOST_FRAMES = 1000
"""Calls of a traceback that are looked at, the innermost: each takes a tenth of a millisecond, and
a body may raise the limit of recursion to a million."""

TYPE_LIMIT = 200
"""Characters of the name of a class that are kept."""


def describe(error: BaseException, step: str) -> dict[str, Any]:
    """The type, message and traceback of an error, as a failure stores them."""
    kind = _text(lambda: type(error).__name__, "an exception")
    message = text_of(error)
    frames = _of_the_body(error)
    trace = _text(
        lambda: "".join(traceback.format_exception(type(error), error, frames, limit=-MOST_FRAMES)),
        # Without a text of the exception itself.
        f"{''.join(traceback.format_tb(frames, limit=-MOST_FRAMES))}{kind}: {message}\n",
    )
    return {
        "type": storable_text(kind[:TYPE_LIMIT]),
        "message": storable_text(message[:MESSAGE_LIMIT]),
        "step": step,
        "traceback": storable_text(trace[-TRACEBACK_LIMIT:]),
    }


def raise_if_leaving(error: BaseException, leaving: Callable[[], bool]) -> None:
    """Raises an error that ends this process; another one is that of the user's code."""
    if not isinstance(error, Exception) and leaving():
        raise error


def line_of(error: BaseException) -> str:
    """The file and line, in the file that was called first, at which it was raised."""
    frame = _of_the_body(error)
    if frame is None:
        return "no line is known"
    path, line = frame.tb_frame.f_code.co_filename, frame.tb_lineno
    while frame := frame.tb_next:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
    return f"{Path(path).name}:{line}"


def cancel_error(reason: str | None) -> dict[str, Any]:
    """The stored error of a cancelled run."""
    return {"type": "RunCancelled", "message": reason or "the run was cancelled"}


def was_cancelled(failed: Mapping[str, Any]) -> bool:
    """Whether a StepFailed with this data was no failure: the cancel of its run ended the step."""
    error = failed.get("error")
    return isinstance(error, Mapping) and error.get("type") == "RunCancelled"


def text_of(error: BaseException) -> str:
    """`str(error)`, or that it has none."""
    kind = _text(lambda: type(error).__name__, "an exception")
    return _text(lambda: str(error), f"<{kind} whose text cannot be shown>")


def is_a(
    error: BaseException, kinds: type[BaseException] | tuple[type[BaseException], ...]
) -> bool:
    """`isinstance`, which would ask the error for its `__class__`."""
    return issubclass(type(error), kinds)


def storable_text(text: str) -> str:
    """Text as Postgres can hold it: without NUL and halves of surrogate pairs."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _text(make: Callable[[], str], otherwise: str) -> str:
    try:
        return str.__str__(make())  # of a subclass of str, the plain text
    except BaseException:  # reported, and not one more failure
        return otherwise


def _of_the_body(error: BaseException) -> TracebackType | None:
    """The traceback from the step's own code on; all of it if the error is one of ours."""
    # As BaseException has it: a class may have another attribute of this name.
    whole: TracebackType | None = vars(BaseException)["__traceback__"].__get__(error)
    found = whole
    while found and str(found.tb_frame.f_globals.get("__name__")).startswith(f"{__package__}."):
        found = found.tb_next
    return found or whole
