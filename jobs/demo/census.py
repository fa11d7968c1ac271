"""The plan `code_census`: statistics of a Python source tree. An example of a long step.

Discover → Parse → Rank → Report. Parse works in chunks and keeps the counts of each finished chunk
in a file of its own, so a worker that is killed in the middle loses the chunk in its hands and no
more: the next attempt, in any worker, skips finished chunks. Step results stay small, as they
are events; large data goes to the work folder.

Input, all of it optional:

    root   the folder to read (default: the standard library of the running Python)
    out    the folder for census.md, census.svg and the work folder (default: ./census/<run id>);
           workers on several machines must share it
    chunk  files per chunk (default: a fortieth of them)
"""

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Self, TypeVar
from xml.sax.saxutils import escape

from beatless.orchestrator.context import StepContext
from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.plan import Plan, step
from beatless.orchestrator.retry import retry

CHUNKS = 40
"""How many chunks a tree is divided into, unless the input says how large one is."""

TOP = 20
"""How long a ranking is."""

LISTED = 100
"""How many of the files that do not parse the report names."""

SKIPPED = frozenset({"__pycache__", "dist-packages", "node_modules", "site-packages"})
"""Folders that hold other people's code or none. Hidden folders are skipped too."""

T = TypeVar("T")


# The steps


@step(name="Discover")
def discover(ctx: StepContext) -> dict[str, Any]:
    """Find the files and divide them into chunks."""
    order = Order.read(ctx.input, run_id=ctx.run_id)
    files = sources(order.root)
    if not files:
        raise Fatal(f"{order.root} has no Python files: name another folder as the input's `root`")
    size = order.chunk or -(-len(files) // CHUNKS)
    # A folder of this run's own: another run may write its report to the same place.
    work = order.out / f"work-{ctx.run_id}"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fatal(f"the input's `out` cannot be written to: {error}") from error
    write(work / "chunks.json", json.dumps(list(batches(files, size))))
    return {
        "root": str(order.root),
        "out": str(order.out),
        "work": str(work),
        "files": len(files),
        "chunks": -(-len(files) // size),
    }


@step(name="Parse", timeout=1800, retry=retry(max_attempts=3))
def parse(ctx: StepContext) -> dict[str, Any]:
    """Count each chunk, apart from those that an earlier attempt has done."""
    found = ctx.results["Discover"]
    root, work = Path(found["root"]), Path(found["work"])
    chunks: list[list[str]] = json.loads(kept(work / "chunks.json"))
    done = 0
    for index, files in enumerate(chunks):
        done += len(files)
        if finished(work, index).exists():
            continue
        ctx.raise_if_cancelled()
        if not counts(work, index).exists():
            note(work / "ledger.jsonl", index=index, attempt=ctx.attempt, pid=os.getpid())
            write(counts(work, index), Tally.of(count(root, file) for file in files).to_json())
        # Kept, then reported, then marked: a worker that dies in between leaves no chunk that is
        # reported but lost or never reported; in the instant before the mark, one reported twice.
        ctx.trace("census.chunk", index=index, files=len(files), of=len(chunks))
        finished(work, index).touch()
        ctx.progress(round(100 * done / found["files"], 1), f"{done:,} of {found['files']:,} files")
    return {"chunks": len(chunks), "files": done}


@step(name="Rank")
def rank(ctx: StepContext) -> dict[str, Any]:
    """Add the chunks up."""
    found = ctx.results["Discover"]
    work = Path(found["work"])
    total = Tally.of(Tally.from_json(kept(counts(work, index))) for index in range(found["chunks"]))
    write(work / "total.json", total.to_json())
    return {
        "files": total.files,
        "lines": total.lines,
        "classes": total.classes,
        "functions": total.functions,
        "broken": len(total.broken),
        "largest": next((module.file for module in total.largest), None),
        "longest": next((function.place for function in total.longest), None),
        "most_complex": next((function.place for function in total.most_complex), None),
        "most_imported": next((module for module, _ in total.most_imported()), None),
    }


@step(name="Report")
def report(ctx: StepContext) -> dict[str, Any]:
    """Write the report and the chart where the user asked for them."""
    found = ctx.results["Discover"]
    out = Path(found["out"])
    total = Tally.from_json(kept(Path(found["work"]) / "total.json"))
    write(out / "census.md", markdown(found["root"], total))
    write(out / "census.svg", chart(total))
    return {
        "report": str(out / "census.md"),
        "chart": str(out / "census.svg"),
        **ctx.results["Rank"],
    }


code_census = Plan("code_census", [discover, parse, rank, report])


# The input


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The run's input, checked."""

    root: Path
    out: Path
    chunk: int | None

    @classmethod
    def read(cls, given: Any, *, run_id: str) -> Self:
        """Raises Fatal, as trying again cannot help."""
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise Fatal('the input must be an object, for example {"root": "src", "out": "census"}')
        for unknown in given.keys() - {"root", "out", "chunk"}:
            raise Fatal(f"the input has an unknown {unknown!r}: it takes `root`, `out` and `chunk`")
        root = cls._folder(given, "root", default=sysconfig.get_path("stdlib"))
        out = cls._folder(given, "out", default=f"census/{run_id}")
        if not root.is_dir():
            raise Fatal(f"{root} is not a folder: name one as the input's `root`")
        match given.get("chunk"):
            case None:
                chunk = None
            case int(chunk) if chunk >= 1 and not isinstance(chunk, bool):
                pass
            case other:
                raise Fatal(f"the input's `chunk` is {other!r}: it must be 1 file or more")
        return cls(root=root, out=out, chunk=chunk)

    @staticmethod
    def _folder(given: dict[str, Any], name: str, *, default: str) -> Path:
        value = given.get(name, default)
        value = default if value is None else value
        if not isinstance(value, str) or not value:
            raise Fatal(f"the input's `{name}` is {value!r}: it must be the path of a folder")
        try:
            path = Path(value).expanduser().resolve()
            path.is_dir()
        except (OSError, RuntimeError) as error:
            raise Fatal(f"the input's `{name}` cannot be used: {error}") from error
        return path


# Counting


def sources(root: Path) -> list[str]:
    """The Python files below a folder that can be read, relative to it and sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED and name[0] != "."]
        for name in files:
            path = Path(folder, name)
            if name.endswith(".py") and os.access(path, os.R_OK) and path.is_file():
                found.append(str(path.relative_to(root)))
    return sorted(found)


@dataclass(slots=True, kw_only=True)
class Function:
    """One function: where it is, how long, how branched and how deeply nested."""

    name: str
    file: str
    line: int
    lines: int
    complexity: int = 1
    """One, and one more for each if, loop, except and case: the ways through the function."""
    depth: int = 0

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One file and its length."""

    file: str
    lines: int


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts over some files. Tallies add up, in any grouping, to the same total."""

    files: int = 0
    lines: int = 0
    classes: int = 0
    functions: int = 0
    longest: list[Function] = field(default_factory=list)
    most_complex: list[Function] = field(default_factory=list)
    largest: list[Module] = field(default_factory=list)
    imports: dict[str, int] = field(default_factory=dict)
    """How many files import each top-level module."""
    broken: list[str] = field(default_factory=list)
    """Files that do not parse, with the reason. Of them nothing else is counted."""

    @classmethod
    def of(cls, parts: Iterable["Tally"]) -> Self:
        """The sum of some tallies."""
        total = cls()
        for part in parts:
            total.add(part)
        return total

    @classmethod
    def from_json(cls, text: str) -> Self:
        members = json.loads(text)
        members["largest"] = [Module(**module) for module in members["largest"]]
        for name in ("longest", "most_complex"):
            members[name] = [Function(**function) for function in members[name]]
        return cls(**members)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def add(self, other: "Tally") -> None:
        """Take in another tally. Only the top of each ranking is kept, so this stays small."""
        self.files += other.files
        self.lines += other.lines
        self.classes += other.classes
        self.functions += other.functions
        self.longest = top(self.longest + other.longest, by=longest_first)
        self.most_complex = top(self.most_complex + other.most_complex, by=most_complex_first)
        self.largest = top(self.largest + other.largest, by=largest_first)
        for module, files in other.imports.items():
            self.imports[module] = self.imports.get(module, 0) + files
        self.broken += other.broken

    def most_imported(self) -> list[tuple[str, int]]:
        """Modules, and how many files import each of them."""
        return top(self.imports.items(), by=lambda item: (-item[1], item[0]))


def top(items: Iterable[T], *, by: Callable[[T], tuple[int | str, ...]]) -> list[T]:
    return sorted(items, key=by)[:TOP]


# Ties go by place, so that the same tree gives the same report.


def longest_first(function: Function) -> tuple[int | str, ...]:
    return -function.lines, function.file, function.line


def most_complex_first(function: Function) -> tuple[int | str, ...]:
    return -function.complexity, -function.depth, function.file, function.line


def largest_first(module: Module) -> tuple[int | str, ...]:
    return -module.lines, module.file


def count(root: Path, file: str) -> Tally:
    """Everything about one file, also if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's, about the code that is counted
            return measure((root / file).read_bytes(), printable(file))
    # A source that is nested too deeply is a RecursionError or, from the parser, a MemoryError.
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Tally(files=1, broken=[printable(f"{file}: {error}")])


BRANCHES = frozenset({ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case})
"""Nodes that add a path through a function."""

BLOCKS = frozenset(
    {
        ast.AsyncFor,
        ast.AsyncWith,
        ast.For,
        ast.If,
        ast.Match,
        ast.Try,
        ast.TryStar,
        ast.While,
        ast.With,
    }
)
"""Nodes that nest the statements inside of them one level deeper."""


def measure(source: bytes, file: str) -> Tally:
    """The counts of one source; `file` is its name. Raises as `ast.parse` does."""
    tree = ast.parse(source, filename=file)
    lines = len(source.splitlines())
    tally = Tally(files=1, lines=lines, largest=[Module(file=file, lines=lines)])
    functions: list[Function] = []
    # Not recursive: generated code may be nested more deeply than Python's own stack allows.
    todo: list[tuple[ast.AST, Function, int]]
    todo = [(tree, Function(name="", file=file, line=1, lines=lines), 0)]
    while todo:
        node, owner, depth = todo.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                # Inner nodes count for the innermost one.
                last = node.end_lineno or node.lineno
                owner = Function(
                    name=f"{owner.name}.{node.name}".lstrip("."),
                    file=file,
                    line=node.lineno,
                    lines=last - node.lineno + 1,
                )
                depth = 0
                if isinstance(node, ast.ClassDef):
                    tally.classes += 1
                else:
                    functions.append(owner)
            case ast.Import():
                tally.imports.update({alias.name.partition(".")[0]: 1 for alias in node.names})
            case ast.ImportFrom(module=str(module), level=0):
                tally.imports[module.partition(".")[0]] = 1
        owner.complexity += type(node) in BRANCHES
        inner = depth + (type(node) in BLOCKS)
        owner.depth = max(owner.depth, inner)
        todo += [(child, owner, depth if is_elif(node, child) else inner) for child in inside(node)]
    tally.functions = len(functions)
    tally.longest = top(functions, by=longest_first)
    tally.most_complex = top(functions, by=most_complex_first)
    return tally


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside a statement. Expressions are not looked into."""
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        yield from getattr(node, part, ())


def is_elif(node: ast.AST, child: ast.AST) -> bool:
    """The syntax tree nests an elif in its if; the person who wrote it did not."""
    return (
        isinstance(node, ast.If)
        and isinstance(child, ast.If)
        and child.col_offset == node.col_offset
    )


def printable(text: str) -> str:
    """The text with unprintable parts escaped: control characters, undecodable names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# The report


def markdown(root: str, total: Tally) -> str:
    """The report as Markdown."""
    summary = (
        f"{code(root)}: {total.files:,} files, {total.lines:,} lines, {total.classes:,} classes, "
        f"{total.functions:,} functions. Files that do not parse: {len(total.broken):,}.\n"
    )
    parts = [
        "# Code census\n",
        summary,
        "![The largest modules, in lines](census.svg)\n",
        "## Longest functions\n",
        table(
            ("lines", "function", "where"),
            [(f"{f.lines:,}", code(f.name), code(f"{f.file}:{f.line}")) for f in total.longest],
        ),
        "## Most complex functions\n",
        table(
            ("complexity", "nesting", "function", "where"),
            [
                (f"{f.complexity:,}", f"{f.depth}", code(f.name), code(f"{f.file}:{f.line}"))
                for f in total.most_complex
            ],
        ),
        "## Largest modules\n",
        table(("lines", "module"), [(f"{m.lines:,}", code(m.file)) for m in total.largest]),
        "## Most imported modules\n",
        table(
            ("files that import it", "module"),
            [(f"{files:,}", code(module)) for module, files in total.most_imported()],
        ),
    ]
    if total.broken:
        parts.append("## Files that do not parse\n")
        parts += [f"- {code(reason)}" for reason in total.broken[:LISTED]]
        if len(total.broken) > LISTED:
            parts.append(f"- and {len(total.broken) - LISTED:,} more")
        parts.append("")
    return "\n".join(parts)


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first column is a number."""
    lines = [titles, ("---:",) + ("---",) * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(text: str) -> str:
    """A name in Markdown, also inside of a table."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"


def chart(total: Tally) -> str:
    """The largest modules as bars: plain SVG that brings its background, light or dark."""
    longest = max((module.lines for module in total.largest), default=1)
    height = 64 + 24 * len(total.largest)
    bars = []
    for place, module in enumerate(total.largest):
        y = 56 + 24 * place
        width = max(2, round(380 * module.lines / max(1, longest)))
        bars.append(
            f'  <text x="262" y="{y + 12}" text-anchor="end">{escape(tail(module.file, 38))}</text>'
            f'<rect class="bar" x="270" y="{y}" width="{width}" height="16" rx="3"/>'
            f'<text class="number" x="{278 + width}" y="{y + 12}">{module.lines:,}</text>'
        )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" class="census" viewBox="0 0 720 {height}" width="720"
     height="{height}" role="img" aria-labelledby="census-title census-desc">
  <title id="census-title">The largest modules, in lines</title>
  <desc id="census-desc">A bar for each of the {len(bars)} largest of {total.files:,} Python files;
    the largest is {escape(total.largest[0].file) if bars else "missing"}.</desc>
  <style>
    .census {{ font: 12px system-ui, sans-serif }}
    .census text {{ fill: #24292f }} .census .number {{ fill: #57606a }}
    .census .page {{ fill: #ffffff }} .census .bar {{ fill: #2f6fce }}
    @media (prefers-color-scheme: dark) {{
      .census text {{ fill: #e6edf3 }} .census .number {{ fill: #9aa5b1 }}
      .census .page {{ fill: #12161c }} .census .bar {{ fill: #5b9bf3 }}
    }}
  </style>
  <rect class="page" width="720" height="{height}" rx="8"/>
  <text x="16" y="30" font-size="16" font-weight="600">The largest modules, in lines</text>
{chr(10).join(bars)}
</svg>
"""


def tail(text: str, length: int) -> str:
    """The end of a text that may be too long: of a path its most specific part."""
    return text if len(text) <= length else "…" + text[1 - length :]


# Files


def counts(work: Path, index: int) -> Path:
    """The path of a chunk's tally."""
    return work / f"chunk-{index:04d}.json"


def finished(work: Path, index: int) -> Path:
    """There when the chunk is kept and its event is committed."""
    return work / f"chunk-{index:04d}.done"


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def note(ledger: Path, **facts: Any) -> None:
    """Add a line with the worker that begins a chunk: one write, so two cannot mix theirs."""
    with ledger.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def kept(path: Path) -> str:
    """The file that an earlier step wrote. Raises Fatal if it is missing."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Fatal(
            f"{path} is missing: it was deleted, or written by a worker on another machine; "
            "start a new run with an `out` that all workers share"
        ) from error


def write(path: Path, text: str) -> None:
    """All of the file or nothing of it, and on the disk when this returns."""
    with NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as draft:
        draft.write(text)
        draft.flush()
        os.fsync(draft.fileno())
    # A temporary file is its owner's only; a report is for all readers of the folder.
    Path(draft.name).chmod(0o644)
    Path(draft.name).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
