"""The options of a run, described once each: here those that a run keeps as they are given.

A description makes the check of a request, the body and the document of `POST /v1/runs`, and the
option of `beatless start`; for an option that is kept also its column: in the table, in the
statements, and in `NewRun` and `Run`. The other options are those of `RunRequest`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, get_type_hints

from beatless.orchestrator.events import storable
from beatless.outbox.times import is_number

PRIORITIES = range(10)

TAGS_BYTES = 16 * 1024
"""Of all names and values in UTF-8: tags are for finding runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """The description of an option: `option` in the metadata of its field."""

    help: str
    """A sentence for the command line and the OpenAPI document."""
    example: Any
    """A good value other than the default, as JSON has it."""
    flag: str = ""
    """On the command line; default: `--name`."""
    metavar: str | None = None
    """The value in the help of the command line."""
    numbers: range | None = None
    """Those that are allowed."""
    problem: Callable[[Any], str] | None = None
    """The problem with a value, to follow the option's name; empty if it has none."""
    header: bool = False
    """It travels as a header, and the command line takes it from its environment."""
    sql_type: str = ""
    """Of the column. A type of Postgres, as the catalog spells it."""
    sql_default: str | None = None
    """Of the column; None: it is nullable. Runs of an older release have it, or null."""

    def problem_with(self, given: Any) -> str:
        """As `problem`, with the numbers that are allowed."""
        if self.numbers is not None and not (is_number(given) and given in self.numbers):
            return f"is {given!r:.200}, which is not {self.numbers[0]} to {self.numbers[-1]}"
        return self.problem(given) if self.problem else ""


def problem_with_text(given: Any, most: int) -> str:
    """The problem with a text of 1 to so many characters."""
    if isinstance(given, str) and 0 < len(given) <= most and storable(given):
        return ""
    return f"must be a string of 1 to {most} characters of valid text, no NUL"


def problem_with_key(given: Any) -> str:
    """The problem with a key."""
    return problem_with_text(given, 256)


def problem_with_tags(given: Any) -> str:
    """The problem with the tags of a run."""
    if not isinstance(given, Mapping):
        return f"is {given!r:.200}, which does not map strings to strings"
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str) or not storable(name + value):
            return "must map strings to strings of valid text, without NUL"
    if sum(len((name + value).encode()) for name, value in given.items()) > TAGS_BYTES:
        return f"are longer than {TAGS_BYTES} bytes: put large values into the input"
    return ""


class StoredKeywords(TypedDict, total=False):
    """The members of `StoredOptions`, as keywords of `start_run`."""

    priority: int
    tags: Mapping[str, str] | None
    dedupe_key: str | None
    group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredOptions:
    """Options that a run keeps: stored as they are given, read back, taken over by a retry."""

    priority: Annotated[
        int,
        Option(
            help="Higher goes first.",
            example=7,
            numbers=PRIORITIES,
            sql_type="smallint",
            sql_default="0",
        ),
    ] = 0
    tags: Annotated[
        Mapping[str, str] | None,
        Option(
            help="Names and values by which the run is found.",
            example={"shop": "berlin"},
            flag="--tag",
            metavar="K=V",
            problem=problem_with_tags,
            sql_type="jsonb",
            sql_default="'{}'",
        ),
    ] = None
    dedupe_key: Annotated[
        str | None,
        Option(
            help="At most one run of the plan with this key is unfinished at a time.",
            example="customer:7",
            problem=problem_with_key,
            sql_type="text",
        ),
    ] = None
    group: Annotated[
        str | None,
        Option(
            help="Whom it belongs to: the groups of a queue take turns.",
            example="tenant-7",
            problem=problem_with_key,
            sql_type="text",
        ),
    ] = None

    def stored_options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in STORED}

    def chosen_options(self) -> dict[str, Any]:
        """Those that are not the default."""
        default = StoredOptions()
        given = self.stored_options().items()
        return {name: value for name, value in given if value and value != getattr(default, name)}


def described(options: type) -> dict[str, Option]:
    """The descriptions of the members of a class, by name."""
    return {
        name: each
        for name, hint in get_type_hints(options, include_extras=True).items()
        for each in getattr(hint, "__metadata__", ())
    }


STORED: Mapping[str, Option] = described(StoredOptions)
"""The descriptions of `StoredOptions`."""

OPTION_SQL = {
    "option_types": ", ".join(f'"{name}" {each.sql_type}' for name, each in STORED.items()),
    "option_parameters": ", ".join(
        f'%({name})s::{each.sql_type} "{name}"' for name, each in STORED.items()
    ),
    "option_columns": ", ".join(f'"{name}"' for name in STORED),
    "option_values": ", ".join(
        f'"{name}"' if each.sql_default is None else f'coalesce("{name}", {each.sql_default})'
        for name, each in STORED.items()
    ),
    "run_options": ", ".join(f"r.{name}" for name in STORED),
}
"""Text of statements by its placeholder: `"priority" smallint, …`,
`%(priority)s::smallint "priority", …`, `"priority", …`,
`coalesce("priority", 0), …`, and `r.priority, …` of a run `r`. A name may be a word of SQL."""
