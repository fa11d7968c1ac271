"""The plan `code_census`: what a Python source tree is made of. An example of a long step.

Discover → Parse → Rank → Report. Parse works through the tree in chunks and keeps each finished
chunk in a file of its own before it says so, so a worker that is killed in the middle loses one
chunk at most: the next attempt skips what is there.

Folders called `test` or `tests` are left out. Input: `root` (a folder, default: the standard
library of the running Python), `out` (a folder, default: ./census/<run id>), `chunk` (files per
chunk, default: a fortieth of the tree).
"""

import ast
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from xml.sax.saxutils import escape

from orchestrator.context import StepContext
from orchestrator.plan import Fatal, Plan, step
from orchestrator.retry import retry

SKIPPED = frozenset(
    {"site-packages", "__pycache__", "node_modules", ".git", ".venv", "test", "tests"}
)
BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.BoolOp, ast.IfExp, ast.comprehension)
TOP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """One function: where it is, how long and how branched."""

    name: str
    file: str
    line: int
    lines: int
    branches: int


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was counted in some files. Tallies add up."""

    files: int = 0
    lines: int = 0
    classes: int = 0
    functions: int = 0
    longest: list[Function] = field(default_factory=list)
    branchiest: list[Function] = field(default_factory=list)
    modules: dict[str, int] = field(default_factory=dict)
    """Lines of each file."""
    imports: dict[str, int] = field(default_factory=dict)
    """How often each top-level module is imported."""
    broken: list[str] = field(default_factory=list)
    """Files that do not parse, with the reason."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        members = json.loads(text)
        for name in ("longest", "branchiest"):
            members[name] = [Function(**function) for function in members[name]]
        return cls(**members)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def add(self, other: Self) -> None:
        """Take in another tally, keeping only the top of each ranking."""
        self.files += other.files
        self.lines += other.lines
        self.classes += other.classes
        self.functions += other.functions
        self.longest = top(self.longest + other.longest, "lines")
        self.branchiest = top(self.branchiest + other.branchiest, "branches")
        self.modules = dict(Counter(self.modules | other.modules).most_common(TOP))
        self.imports = dict(Counter(self.imports) + Counter(other.imports))
        self.broken += other.broken


def top(functions: Sequence[Function], what: str) -> list[Function]:
    """The first twenty by `lines` or `branches`; ties go by place, so the answer is always same."""
    return sorted(functions, key=lambda f: (-getattr(f, what), f.file, f.line))[:TOP]


def sources(root: Path) -> list[str]:
    """The Python files below a folder, relative and sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [
            str((Path(folder) / name).relative_to(root)) for name in files if name.endswith(".py")
        ]
    return sorted(found)


def count(root: Path, file: str) -> Tally:
    """Everything about one file."""
    try:
        text = (root / file).read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(text, filename=file)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return Tally(files=1, broken=[f"{file}: {error}"])
    tally = Tally(files=1, lines=text.count("\n") + 1)
    tally.modules[file] = tally.lines
    imports: Counter[str] = Counter()
    branches: Counter[ast.AST] = Counter()
    functions: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
    below: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    while below:
        node, owner = below.pop()
        match node:
            case ast.ClassDef():
                tally.classes += 1
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                functions.append(node)
                owner = node  # a nested function's branches are its own
            case ast.Import():
                imports.update(alias.name.partition(".")[0] for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                imports[module.partition(".")[0]] += 1
            case _ if isinstance(node, BRANCHES):
                branches[owner] += 1
        below += [(child, owner) for child in ast.iter_child_nodes(node)]
    found = [
        Function(
            name=function.name,
            file=file,
            line=function.lineno,
            lines=(function.end_lineno or function.lineno) - function.lineno + 1,
            branches=branches[function],
        )
        for function in functions
    ]
    tally.functions = len(found)
    tally.longest, tally.branchiest = top(found, "lines"), top(found, "branches")
    tally.imports = dict(imports)
    return tally


def write_durably(path: Path, text: str) -> None:
    """All of the file or nothing of it, even if the machine stops in the middle."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def unfinished(work: Path, chunks: int) -> Iterator[int]:
    """The chunks that are not on disk yet."""
    return (index for index in range(chunks) if not chunk_file(work, index).exists())


def chunk_file(work: Path, index: int) -> Path:
    return work / f"chunk-{index:04d}.json"


@step(name="Discover")
def discover(ctx: StepContext) -> dict[str, Any]:
    """Find the files and divide them into chunks."""
    given = ctx.input or {}
    root = Path(given.get("root") or sysconfig.get_path("stdlib")).expanduser().resolve()
    if not root.is_dir():
        raise Fatal(f"{root} is not a folder: give one as the input's `root`")
    out = Path(given.get("out") or Path("census") / ctx.run_id).expanduser().resolve()
    files = sources(root)
    if not files:
        raise Fatal(f"{root} has no Python files: give another folder as the input's `root`")
    size = int(given.get("chunk") or max(1, len(files) // 40))
    if size < 1:
        raise Fatal(f"the input's `chunk` is {size}: it must be at least 1 file")
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_durably(work / "files.json", json.dumps(files))
    chunks = -(-len(files) // size)
    return {
        "root": str(root),
        "out": str(out),
        "files": len(files),
        "chunk": size,
        "chunks": chunks,
    }


@step(name="Parse", timeout=1800, retry=retry(max_attempts=3))
def parse(ctx: StepContext) -> dict[str, Any]:
    """Count every chunk that is not counted yet."""
    found = ctx.results["Discover"]
    root, work = Path(found["root"]), Path(found["out"]) / "work"
    files: list[str] = json.loads((work / "files.json").read_text())
    chunks, size = found["chunks"], found["chunk"]
    for index in unfinished(work, chunks):
        ctx.raise_if_cancelled()
        # The ledger tells afterwards how often each chunk was begun, and by whom.
        with (work / "ledger.jsonl").open("a") as ledger:
            ledger.write(
                json.dumps({"chunk": index, "attempt": ctx.attempt, "pid": os.getpid()}) + "\n"
            )
        tally = Tally()
        for file in files[index * size : (index + 1) * size]:
            tally.add(count(root, file))
        write_durably(chunk_file(work, index), tally.to_json())
        ctx.trace("census.chunk", index=index, files=tally.files, of=chunks)
        ctx.progress(
            round(100 * (index + 1) / chunks, 1), f"{(index + 1) * size:,} of {len(files):,} files"
        )
    return {"chunks": chunks}


@step(name="Rank")
def rank(ctx: StepContext) -> dict[str, Any]:
    """Add the chunks up."""
    found = ctx.results["Discover"]
    work = Path(found["out"]) / "work"
    total = Tally()
    for index in range(found["chunks"]):
        total.add(Tally.from_json(chunk_file(work, index).read_text()))
    write_durably(work / "total.json", total.to_json())
    return {
        "files": total.files,
        "lines": total.lines,
        "classes": total.classes,
        "functions": total.functions,
        "broken": len(total.broken),
    }


@step(name="Report")
def report(ctx: StepContext) -> dict[str, Any]:
    """Write the report and the chart where the user asked for them."""
    found, counts = ctx.results["Discover"], ctx.results["Rank"]
    out = Path(found["out"])
    total = Tally.from_json((out / "work" / "total.json").read_text())
    write_durably(out / "census.md", markdown(found["root"], total))
    write_durably(out / "census.svg", chart(total))
    return {"report": str(out / "census.md"), "chart": str(out / "census.svg"), **counts}


def markdown(root: str, total: Tally) -> str:
    """The report as Markdown."""
    summary = (
        f"`{root}`: {total.files:,} files, {total.lines:,} lines, {total.classes:,} classes, "
        f"{total.functions:,} functions; {len(total.broken)} files do not parse."
    )
    lines = [
        "# Code census",
        "",
        summary,
        "",
        "![The largest modules](census.svg)",
        "",
    ]
    for title, functions, what in (
        ("Longest functions", total.longest, "lines"),
        ("Most branched functions", total.branchiest, "branches"),
    ):
        lines += [f"## {title}", "", f"| {what} | function | place |", "|---:|---|---|"]
        lines += [f"| {getattr(f, what):,} | `{f.name}` | {f.file}:{f.line} |" for f in functions]
        lines.append("")
    lines += ["## Most imported modules", "", "| imports | module |", "|---:|---|"]
    popular = sorted(total.imports.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    lines += [f"| {times:,} | `{module}` |" for module, times in popular]
    if total.broken:
        lines += ["", "## Files that do not parse", ""]
        lines += [f"- `{reason}`" for reason in total.broken[:TOP]]
    return "\n".join(lines) + "\n"


def chart(total: Tally) -> str:
    """The largest modules as a bar chart: plain SVG, readable on light and dark pages."""
    rows = sorted(total.modules.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    longest = max((lines for _, lines in rows), default=1)
    bars = []
    for place, (module, lines) in enumerate(rows):
        y = 56 + place * 24
        width = max(1, round(420 * lines / longest))
        bars.append(
            f'  <text x="252" y="{y + 13}" text-anchor="end">{escape(module[-36:])}</text>\n'
            f'  <rect x="260" y="{y}" width="{width}" height="16" rx="2"/>\n'
            f'  <text x="{268 + width}" y="{y + 13}">{lines:,}</text>'
        )
    height = 72 + 24 * len(rows)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img"
     aria-labelledby="title desc" font-family="system-ui, sans-serif" font-size="12">
  <title id="title">The largest modules</title>
  <desc id="desc">Lines of code of the {len(rows)} largest of {total.files} Python files</desc>
  <style>
    text {{ fill: #333 }} rect {{ fill: #3b7dd8 }}
    @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} rect {{ fill: #6ea8fe }} }}
  </style>
  <text x="12" y="28" font-size="16" font-weight="600">The largest modules, in lines</text>
{chr(10).join(bars)}
</svg>
"""


code_census = Plan("code_census", [discover, parse, rank, report])
