"""Reads named SQL statements from the `.sql` file beside a module. Runs nothing.

A file is a list of blocks. A block has a name, a description and a text:

    -- name: mark_kept
    -- Set when runs are looked at again whose messages are in the broker still.
    UPDATE {schema}.dispatches …

Comments have lines of their own and are not sent, nor is what indents a line. Values are
parameters, `%(name)s`; a variant is a statement of its own. A placeholder in braces is one of

* `{schema}`, the name of the schema, which the settings have checked;
* `{event_json}`, a fragment: text that several statements share, `-- fragment: event_json`. It is
  defined above them in their file, or in the `fragments.sql` of their package or of the outbox;
* `{per_shard}`, a number that Python code uses too, or that the planner must see: for a LIMIT that
  is a parameter it assumes a tenth of the rows;
* `{option_columns}`, text that Python code makes: see `orchestrator/options.py`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

_HEAD = re.compile(r"-- (name|fragment): ([a-z][a-z_]*)")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")

SHARED = "fragments.sql"
"""The file of fragments that several files of a package share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One block of a file, with its fragments put in."""

    name: str
    description: str
    """The comment under its name."""
    text: str

    @property
    def placeholders(self) -> frozenset[str]:
        """The placeholders: `schema`, and names of values."""
        return frozenset(_PLACEHOLDER.findall(self.text))


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementFile:
    """The blocks of one file, by name."""

    statements: Mapping[str, Statement]
    fragments: Mapping[str, Statement]
    """Its own, and those that it was given."""

    @classmethod
    def parse(cls, text: str, *, fragments: Mapping[str, Statement], where: str) -> "StatementFile":
        """Raises ValueError, naming `where`, for a block that is not well formed.

        Each has a description and a text; no name stands twice.
        """
        statements: dict[str, Statement] = {}
        visible = dict(fragments)
        for kind, name, lines in _blocks(text, where):
            comments = [line.strip() for line in lines if line.lstrip().startswith("--")]
            texts = [line.strip() for line in lines if not line.lstrip().startswith("--")]
            body = "\n".join(texts).strip()
            if not lines or not lines[0].startswith("-- ") or not body:
                raise ValueError(f"{where}: {name} lacks a description or a text")
            if "-- " in body:
                raise ValueError(f"{where}: {name} has a comment beside text")
            if name in statements or name in visible:
                raise ValueError(f"{where}: {name} is defined twice")
            found = Statement(
                name=name,
                description=" ".join(comment.lstrip("- ") for comment in comments),
                text=_PLACEHOLDER.sub(lambda match: _expanded(match, visible), body),
            )
            (statements if kind == "name" else visible)[name] = found
        return cls(statements=statements, fragments=visible)


def statements(module: str, schema: str, **values: float | str) -> dict[str, str]:
    """The statements of the file beside a module, which gives its `__file__`, by name.

    Raises ValueError if a placeholder is neither `schema` nor one of these values, or if one of
    the values is in no statement.
    """
    texts = {"schema": schema} | {name: f"{value}" for name, value in values.items()}
    return dict(_texts(module, tuple(texts.items())))


@lru_cache(maxsize=1024)
def _texts(module: str, values: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    """Kept: every client of a namespace has the statements of the same few files."""
    found = read(Path(module).with_suffix(".sql")).statements
    placeholders = {name for each in found.values() for name in each.placeholders}
    if unused := dict(values).keys() - {"schema"} - placeholders:
        raise ValueError(f"no statement beside {module} has {', '.join(sorted(unused))}")
    return {name: _filled(each, dict(values)) for name, each in found.items()}


def fragment(name: str, schema: str, **numbers: float) -> str:
    """One of the outbox's shared fragments, filled in as by `statements`."""
    values = {"schema": schema} | {key: f"{number}" for key, number in numbers.items()}
    return _filled(read(Path(__file__).with_name(SHARED)).fragments[name], values)


@cache
def read(path: Path) -> StatementFile:
    """A file as it was at its first reading: each process reads it once."""
    outer: Mapping[str, Statement] = {}
    for shared in dict.fromkeys([Path(__file__).with_name(SHARED), path.with_name(SHARED)]):
        if shared != path and shared.exists():
            outer = read(shared).fragments
    return StatementFile.parse(
        path.read_text(encoding="utf-8"), fragments=outer, where=f"{path.parent.name}/{path.name}"
    )


def _blocks(text: str, where: str) -> Iterable[tuple[str, str, list[str]]]:
    """(kind, name, lines below the name) of each block."""
    blocks: list[tuple[str, str, list[str]]] = []
    for line in text.splitlines():
        if head := _HEAD.fullmatch(line.rstrip()):
            blocks.append((head[1], head[2], []))
        elif blocks:
            blocks[-1][2].append(line)
        elif line and not line.startswith("--"):
            raise ValueError(f"{where}: text before the first block")
    return blocks


def _expanded(match: re.Match[str], fragments: Mapping[str, Statement]) -> str:
    found = fragments.get(match[1])
    return found.text if found else match[0]


def _filled(statement: Statement, values: Mapping[str, str]) -> str:
    unknown = statement.placeholders - values.keys()
    if unknown:
        raise ValueError(f"{statement.name} has no value for {', '.join(sorted(unknown))}")
    return _PLACEHOLDER.sub(lambda match: values[match[1]], statement.text)
