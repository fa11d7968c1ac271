"""The answers of checks: a severity, a sentence, and the advice that goes with it."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The severities, the worst last."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    PROBLEM = "problem"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer of one check, as it is printed."""

    check: str
    status: Status
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One answer of a check, which need not know its own name."""

    status: Status
    text: str
    advice: str = ""

    def of(self, check: str) -> Finding:
        """The same under the name of its check."""
        return Finding(check=check, status=self.status, text=self.text, advice=self.advice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One leg of the canary's way."""

    name: str
    seconds: float | None
    """None if it could not be seen."""
    text: str


def ok(text: str) -> Verdict:
    """Nothing to do."""
    return Verdict(status=Status.OK, text=text)


def skipped(text: str) -> Verdict:
    """Not checked, for this reason. Counts as well."""
    return Verdict(status=Status.SKIPPED, text=text)


def warn(text: str, advice: str) -> Verdict:
    """The stack works, and something should be mended. The exit status stays 0."""
    return Verdict(status=Status.WARNING, text=text, advice=advice)


def problem(text: str, advice: str) -> Verdict:
    """Something must be mended. Exit status 1."""
    return Verdict(status=Status.PROBLEM, text=text, advice=advice)


def unreachable(server: str, error: BaseException, *, setting: str) -> Verdict:
    """A server does not answer at the URL of this setting. Exit status 3."""
    return Verdict(
        status=Status.UNREACHABLE,
        text=f"{server} cannot be reached: {reason_of(error)}",
        advice=f"see whether it runs, and what {setting} says",
    )


def reason_of(error: BaseException) -> str:
    """The first line of an error, or of the driver's error in it."""
    cause = getattr(error, "orig", None) or getattr(error, "reason", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def counted(number: int, noun: str) -> str:
    """A number and its noun, as "1 run" and "2,000 runs"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
