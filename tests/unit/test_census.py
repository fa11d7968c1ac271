"""The pure parts of the demo plan `code_census`, and its steps on small trees."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from beatless.demo.census import (
    TOP,
    Order,
    Tally,
    batches,
    chart,
    code,
    code_census,
    count,
    markdown,
    measure,
    printable,
    sources,
    tail,
    write,
)
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.errors import Fatal, RunCancelled
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.records import RUN_COLUMNS, Run
from beatless.orchestrator.step_output import StepOutput

SVG = "{http://www.w3.org/2000/svg}"


JOURNAL = Journal("nowhere", max_event_bytes=65_536)


class Killed(BaseException):
    """Stands for the end of the process: no step can catch it."""


class NoWriter:
    """No step of the census emits."""

    def write_output(self, output: StepOutput) -> None:
        raise NotImplementedError

    def begin_portion(self, output: StepOutput) -> None:
        raise NotImplementedError

    def end_portion(self, output: StepOutput, appended: object, *, in_doubt: bool) -> None:
        raise NotImplementedError


@dataclass
class Worked:
    """A run whose steps are given real contexts, and whose events are kept here."""

    input: Any = None
    run_id: str = "r1"
    attempt: int = 1
    results: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Attempt and data of each."""
    before_chunk: Callable[[int], None] = lambda index: None
    """Called when the event of a chunk is about to be committed."""
    cancelled: bool = False

    def work(self, *names: str) -> None:
        """Execute these steps of the plan, or all of them."""
        for step in code_census.steps:
            if step.name in names or not names:
                self.results[step.name] = step(self._context(step.name))

    def _context(self, step: str) -> StepContext:
        known = {"run_id": self.run_id, "plan": code_census.name, "input": self.input}
        self._lease = Lease(run=Run(**dict.fromkeys(RUN_COLUMNS) | known), token=1)
        return StepContext(
            lease=self._lease,
            step=step,
            attempt=self.attempt,
            results=self.results,
            journal=JOURNAL,
            append=self._append,
            output=StepOutput(
                run_id=self.run_id,
                step=step,
                attempt=self.attempt,
                max_event_bytes=JOURNAL.max_event_bytes,
                writer=NoWriter(),
                announce=lambda output, full: None,
            ),
            check_cancel=lambda: False,
            connection=None,
        )

    def _append(self, event: NewEvent) -> None:
        data = json.loads(event.data or "{}")
        if data["name"] == "census.chunk":
            self.before_chunk(data["index"])
            self._lease.cancelled = self.cancelled
        self.events.append((self.attempt, data))

    def told(self, name: str) -> list[dict[str, Any]]:
        return [data for _, data in self.events if data["name"] == name]

    def ledger(self) -> list[dict[str, Any]]:
        text = (Path(self.results["Discover"]["work"]) / "ledger.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def parse_killed_at(self, index: int) -> None:
        """A chunk is in its file, its event is not committed: the narrowest place to die in."""

        def kill(about_to_tell: int) -> None:
            if about_to_tell == index and self.attempt == 1:
                raise Killed

        self.before_chunk = kill
        with pytest.raises(Killed):
            self.work("Parse")
        self.attempt = 2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Seven files in three folders, one of which does not parse."""
    root = tmp_path / "tree"
    for name in ("a.py", "b.py", "pkg/__init__.py", "pkg/c.py", "pkg/deep/d.py", "pkg/deep/e.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"import os\n\n\ndef {Path(name).stem}():\n    pass\n")
    (root / "z.py").write_text("def broken(:\n")
    return root


@pytest.fixture
def run(tree: Path, tmp_path: Path) -> Worked:
    return Worked({"root": str(tree), "out": str(tmp_path / "out"), "chunk": 2})


def measured(source: str) -> Tally:
    return measure(dedent(source).encode(), "m.py")


def test_functions_and_classes_are_counted_wherever_they_are() -> None:
    tally = measured(
        """\
        class A:
            async def method(self):
                def inner():
                    pass
                class Local: ...
        if A:
            def conditional(): ...
        """
    )

    assert (tally.files, tally.lines, tally.classes, tally.functions) == (1, 7, 2, 3)
    assert [(f.name, f.line, f.lines) for f in tally.longest] == [
        ("A.method", 2, 4),
        ("A.method.inner", 3, 2),
        ("conditional", 7, 1),
    ]


def test_complexity_is_one_and_one_more_for_each_way_to_go() -> None:
    [function] = measured(
        """\
        def f(x):
            if x:
                pass
            elif x is None:
                pass
            else:
                pass
            for y in x:
                while y:
                    pass
            try:
                pass
            except ValueError:
                pass
            except OSError:
                pass
            match x:
                case 1:
                    pass
                case _:
                    pass
        """
    ).most_complex

    assert function.complexity == 1 + 2 + 2 + 2 + 2


def test_branches_of_an_inner_function_or_class_are_not_its_owners() -> None:
    tally = measured(
        """\
        def outer(x):
            def inner():
                if x:
                    pass
            class C:
                if x:
                    pass
        """
    )

    assert {f.name: (f.complexity, f.depth) for f in tally.most_complex} == {
        "outer": (1, 0),
        "outer.inner": (2, 1),
    }


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        ("pass", 0),
        ("if a: pass", 1),
        ("if a: pass\n    elif b: pass\n    elif c: pass", 1),
        ("if a: pass\n    else:\n        if b: pass", 2),
        ("with a:\n        for b in a:\n            try: pass\n            finally: pass", 3),
    ],
)
def test_nesting_is_what_the_eye_sees(body: str, depth: int) -> None:
    assert measure(f"def f():\n    {body}\n".encode(), "m.py").longest[0].depth == depth


def test_a_module_that_a_file_imports_twice_is_counted_once_and_relative_ones_never() -> None:
    tally = measured(
        """\
        import os, os.path
        from os import sep
        from . import sibling
        from .sibling import name
        def f():
            import json.decoder
        """
    )

    assert tally.imports == {"os": 1, "json": 1}


def test_an_empty_file_is_a_file() -> None:
    tally = measured("")

    assert (tally.files, tally.lines, tally.functions, tally.broken) == (1, 0, 0, [])


@pytest.mark.parametrize(
    "source",
    [
        b"def broken(:\n",
        b"a\0b",
        b"# coding: nosuch\n",
        b"x = '\xff'\n",
        b"-" * 100_000 + b"1",
        b"(" * 1000,
    ],
    ids=["syntax", "nul", "coding", "not-utf8", "too-deep", "parentheses"],
)
def test_a_file_that_does_not_parse_is_listed_and_nothing_else(
    tmp_path: Path, source: bytes
) -> None:
    (tmp_path / "bad.py").write_bytes(source)

    tally = count(tmp_path, "bad.py")

    assert replace(tally, broken=[]) == Tally(files=1)
    assert len(tally.broken) == 1
    assert tally.broken[0].startswith("bad.py: ")


def test_a_file_that_is_gone_is_listed(tmp_path: Path) -> None:
    assert "No such file" in count(tmp_path, "gone.py").broken[0]


def test_a_long_chain_of_operators_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = " + " + ".join(["1"] * 900) + "\n")

    assert count(tmp_path, "long.py").broken == []


def test_what_the_parser_warns_of_is_counted_in_silence(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_bytes(b"def f():\n    return '\\d'\n")

    assert count(tmp_path, "old.py").functions == 1


def test_encodings_and_byte_order_marks_are_read_as_python_reads_them(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xff'\n")
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbfdef f(): ...\r\n")

    assert count(tmp_path, "latin.py").broken == []
    assert count(tmp_path, "bom.py").functions == 1


def test_sources_are_the_trees_own_files_sorted(tree: Path) -> None:
    for name in ("site-packages/x.py", "__pycache__/x.py", ".hidden/x.py", "pkg/readme.txt"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    (tree / "folder.py").mkdir()
    (tree / "dangling.py").symlink_to("nowhere")

    assert sources(tree) == [
        "a.py",
        "b.py",
        "pkg/__init__.py",
        "pkg/c.py",
        "pkg/deep/d.py",
        "pkg/deep/e.py",
        "z.py",
    ]


def test_tallies_add_up_the_same_in_any_grouping(tree: Path) -> None:
    parts = [count(tree, file) for file in sources(tree)]

    assert Tally.of(parts) == Tally.of([Tally.of(parts[:3]), Tally.of(parts[3:])])
    assert Tally.of(parts).imports == {"os": 6}
    assert Tally.of([]) == Tally()


def test_rankings_are_cut_and_ties_go_by_place() -> None:
    parts = [measure(b"def f(): ...\n", f"{n:03d}.py") for n in reversed(range(TOP + 5))]

    total = Tally.of(parts)

    assert [f.file for f in total.longest] == [f"{n:03d}.py" for n in range(TOP)]
    assert [m.file for m in total.largest] == [f"{n:03d}.py" for n in range(TOP)]
    assert total.functions == TOP + 5


def test_a_tally_comes_back_from_its_file(tree: Path) -> None:
    total = Tally.of(count(tree, file) for file in sources(tree))

    assert Tally.from_json(total.to_json()) == total


def test_batches_are_all_items_in_order() -> None:
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(batches([], 2)) == []


def test_names_that_no_report_can_hold_are_escaped() -> None:
    assert printable("naïve.py") == "naïve.py"
    assert printable("a\nb\x1b\udcff.py") == "a\\nb\\x1b\\udcff.py"
    assert code("a|`b`") == "`a\\|'b'`"


def test_of_a_long_path_the_end_is_shown() -> None:
    assert tail("pkg/module.py", 13) == "pkg/module.py"
    assert tail("pkg/module.py", 10) == "…module.py"


def test_a_file_is_replaced_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    write(tmp_path / "f", "one")
    write(tmp_path / "f", "two")

    assert (tmp_path / "f").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "must be an object"),
        ("src", "must be an object"),
        ({"rot": "/"}, "unknown 'rot': it takes `root`, `out` and `chunk`"),
        ({"root": 7}, "`root` is 7: it must be the path of a folder"),
        ({"root": ""}, "`root` is ''"),
        ({"root": "/no/such/folder"}, "/no/such/folder is not a folder"),
        ({"root": "~nobody-of-this-name/x"}, "`root` cannot be used"),
        ({"root": "x" * 5000}, "`root` cannot be used"),
        ({"root": __file__}, "is not a folder"),
        ({"chunk": 0}, "`chunk` is 0: it must be 1 file or more"),
        ({"chunk": True}, "`chunk` is True"),
        ({"chunk": "9"}, "`chunk` is '9'"),
        ({"out": ["x"]}, "`out` is ['x']"),
    ],
)
def test_bad_input_fails_with_a_sentence(given: Any, says: str) -> None:
    with pytest.raises(Fatal) as raised:
        Order.read(given, run_id="r1")

    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", [None, {}, {"root": None, "out": None, "chunk": None}])
def test_without_input_it_reads_the_standard_library(given: Any) -> None:
    order = Order.read(given, run_id="r1")

    assert (order.root / "ast.py").is_file()
    assert order.out == Path.cwd() / "census" / "r1"
    assert order.chunk is None


def test_a_tree_without_python_files_fails_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="has no Python files"):
        Worked({"root": str(tmp_path), "out": str(tmp_path / "out")}).work()

    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_made_fails_with_a_sentence(tree: Path) -> None:
    with pytest.raises(Fatal, match="`out` cannot be written to"):
        Worked({"root": str(tree), "out": str(tree / "a.py")}).work()


def test_the_plan_from_the_tree_to_the_report(run: Worked, tmp_path: Path) -> None:
    run.work()

    assert list(run.results) == ["Discover", "Parse", "Rank", "Report"]
    assert run.told("census.chunk") == [
        {"name": "census.chunk", "index": 0, "files": 2, "of": 4},
        {"name": "census.chunk", "index": 1, "files": 2, "of": 4},
        {"name": "census.chunk", "index": 2, "files": 2, "of": 4},
        {"name": "census.chunk", "index": 3, "files": 1, "of": 4},
    ]
    assert run.told("progress")[0] == {"name": "progress", "pct": 28.6, "note": "2 of 7 files"}
    assert run.results["Report"] == {
        "report": str(tmp_path / "out" / "census.md"),
        "chart": str(tmp_path / "out" / "census.svg"),
        "files": 7,
        "lines": 30,
        "classes": 0,
        "functions": 6,
        "broken": 1,
        "largest": "a.py",
        "longest": "a.py:4 a",
        "most_complex": "a.py:4 a",
        "most_imported": "os",
    }
    assert "- `z.py: " in (tmp_path / "out" / "census.md").read_text()
    ET.parse(tmp_path / "out" / "census.svg")


def test_a_tree_in_which_nothing_parses_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("(")
    run = Worked({"root": str(tmp_path), "out": str(tmp_path / "out")})

    run.work()

    assert run.results["Rank"]["broken"] == 1
    assert run.results["Rank"]["largest"] is None
    ET.parse(tmp_path / "out" / "census.svg")


@pytest.mark.parametrize(("files", "chunks"), [(1, 1), (39, 39), (40, 40), (41, 21), (400, 40)])
def test_a_tree_is_divided_into_forty_chunks_at_most(
    tmp_path: Path, files: int, chunks: int
) -> None:
    for number in range(files):
        (tmp_path / f"{number}.py").touch()
    run = Worked({"root": str(tmp_path), "out": str(tmp_path / "out")})

    run.work("Discover")

    assert run.results["Discover"]["chunks"] == chunks


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_attempt_after_a_kill_parses_no_finished_chunk_again(run: Worked, at: int) -> None:
    run.work("Discover")

    run.parse_killed_at(at)
    run.work("Parse", "Rank", "Report")

    assert [entry["index"] for entry in run.ledger()] == [0, 1, 2, 3]
    assert [entry["attempt"] for entry in run.ledger()] == [1] * (at + 1) + [2] * (3 - at)
    assert [data["index"] for data in run.told("census.chunk")] == [0, 1, 2, 3]
    assert run.results["Rank"]["files"] == 7


def test_progress_after_a_kill_does_not_go_back(run: Worked) -> None:
    run.work("Discover")

    run.parse_killed_at(2)
    run.work("Parse")

    shown = [(attempt, data["pct"]) for attempt, data in run.events if "pct" in data]
    assert (1, 28.6) in shown
    assert (2, 85.7) in shown
    assert shown == sorted(shown)


def test_a_cancel_ends_parse_between_two_chunks(run: Worked) -> None:
    run.work("Discover")

    def cancel(about_to_tell: int) -> None:
        run.cancelled = about_to_tell == 1

    run.before_chunk = cancel
    with pytest.raises(RunCancelled):
        run.work("Parse")

    assert [entry["index"] for entry in run.ledger()] == [0, 1]
    assert [data["index"] for data in run.told("census.chunk")] == [0, 1]


def test_two_runs_that_write_to_the_same_place_do_not_read_each_others_chunks(
    run: Worked, tmp_path: Path
) -> None:
    run.work()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "only.py").write_text("x = 1\n")
    other = Worked({**run.input, "root": str(tmp_path / "other")}, run_id="r2")

    other.work()

    assert other.results["Rank"]["files"] == 1
    assert "only.py" in (tmp_path / "out" / "census.md").read_text()


def test_a_work_folder_that_is_not_here_fails_with_a_sentence(run: Worked) -> None:
    run.work("Discover")
    run.results["Discover"]["work"] += "-elsewhere"

    with pytest.raises(Fatal, match="an `out` that all workers share"):
        run.work("Parse")


def test_the_same_tree_gives_the_same_report(run: Worked, tmp_path: Path) -> None:
    run.work()
    again = Worked({**run.input, "out": str(tmp_path / "again"), "chunk": 3}, run_id="r2")
    again.work()

    for name in ("census.md", "census.svg"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "again" / name).read_text()


def test_the_chart_has_a_bar_for_each_module_and_says_what_it_is() -> None:
    files = ["a&b<c>.py", printable("ctrl\x01.py"), "long/" * 20 + "end.py"]
    total = Tally.of(measure(b"\n" * (n + 1), file) for n, file in enumerate(files))

    svg = ET.fromstring(chart(total))

    assert svg.get("role") == "img"
    labels = {
        element.get("id"): element.text
        for element in svg
        if element.tag in (f"{SVG}title", f"{SVG}desc")
    }
    assert " ".join(labels) == svg.get("aria-labelledby")
    assert all(labels.values())
    bars = [bar for bar in svg.iter(f"{SVG}rect") if bar.get("class") == "bar"]
    assert [int(bar.get("width")) for bar in bars] == [380, 253, 127]
    assert "a&b<c>.py" in [text.text for text in svg.iter(f"{SVG}text")]
    assert "prefers-color-scheme: dark" in svg.find(f"{SVG}style").text


def test_the_report_names_no_more_broken_files_than_a_person_reads() -> None:
    text = markdown("/src", Tally(files=102, broken=[f"{n}.py: bad" for n in range(102)]))

    assert text.count(".py: bad") == 100
    assert text.endswith("- and 2 more\n")


def test_every_row_of_a_table_has_its_columns(tree: Path) -> None:
    (tree / "pi|pe.py").write_text("def f(): ...\n")
    total = Tally.of(count(tree, file) for file in sources(tree))

    for block in markdown("/src", total).split("\n\n"):
        if block.startswith("|"):
            rows = block.replace("\\|", "").splitlines()
            assert len({row.count("|") for row in rows}) == 1
