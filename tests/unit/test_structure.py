"""The shape of the product's modules: short, named, and closed to one another."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.architecture import ROOT, modules, tree_of

MODULE_LINES, CLASS_LINES, FUNCTION_LINES = 550, 400, 120
RELATIVES = 0.02
"""The share of docstrings that may begin with a free relative: "What…", "Whoever…"."""

Block = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

REASON = re.compile(r"\b(Long|Large)\b[^.]*\b(because|so that|for)\b")
"""What the docstring of a longer one says: "Long, because …"."""

FOREIGN = {
    "_exit": "os",
    "_current_frames": "sys",
    "_getframe": "sys",
    "_make": "a named tuple",
    "_name_": "an enumeration",
    "_value_": "an enumeration",
    "_set_running_loop": "asyncio: what event loops are made with, in its __all__",
}
"""Names with an underscore that the standard library documents, and where they are."""

OF_OTHERS = {
    "_config": "multiprocessing: the name of a child",
    "_establish_connection": "kombu: the one door of each connection",
    "_protected": "celery: whether a request is a call by its worker",
    "_should_have_exited": "billiard: a child that was asked to end",
    "_shutdown_cleanup": "billiard: what a child does at its end",
    "_state": "celery: the app of the thread",
    "_tls": "celery: the app of the thread",
}
"""Private names of packages that have no public one, and what for; the code says why."""


def blocks(tree: ast.Module) -> Iterator[Block]:
    return (node for node in ast.walk(tree) if isinstance(node, Block))


def lines(block: Block) -> int:
    return (block.end_lineno or block.lineno) - block.lineno + 1


def too_long(tree: ast.Module, length: int) -> set[str]:
    """The module ("") and the classes and functions that pass their limit without a reason."""
    found: dict[str, Block | ast.Module] = {"": tree} if length > MODULE_LINES else {}
    for block in blocks(tree):
        limit = CLASS_LINES if isinstance(block, ast.ClassDef) else FUNCTION_LINES
        if lines(block) > limit:
            found[block.name] = block
    return {
        name for name, block in found.items() if not REASON.search(ast.get_docstring(block) or "")
    }


def test_modules_classes_and_functions_are_short_or_say_why_not() -> None:
    found = {
        (name or path.stem, str(path.relative_to(ROOT)))
        for module, path in modules().items()
        for name in too_long(tree_of(module), len(path.read_text().splitlines()))
    }
    assert found == set()


def test_the_rule_of_length_bites_and_takes_a_reason() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    assert too_long(ast.parse(f"def f():\n{body}"), 1) == {"f"}
    assert too_long(ast.parse(f'def f():\n    """Long, because flat."""\n{body}'), 1) == set()
    assert too_long(ast.parse("class C:\n" + "    x = 1\n" * CLASS_LINES), 1) == {"C"}
    assert too_long(ast.parse("x = 1"), MODULE_LINES + 1) == {""}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> set[str]:
    """The private names that a module itself gives: functions, classes, variables, attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name("self" | "cls")):
                found.add(name)
    return found


def touched(tree: ast.Module) -> set[str]:
    """The private names of other modules that a module uses or imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name("self" | "cls")):
                pass
            case ast.Attribute(attr=name) if private(name):
                found.add(name)
            case ast.ImportFrom(names=aliases):
                found |= {alias.name for alias in aliases if private(alias.name)}
    return found - defined(tree)


def test_no_private_member_of_another_module_is_touched() -> None:
    found = {
        (name, str(path.relative_to(ROOT)))
        for module, path in modules().items()
        for name in touched(tree_of(module)) - FOREIGN.keys()
    }
    assert {name for name, _ in found} == OF_OTHERS.keys(), found


@pytest.mark.parametrize(
    "source",
    ["relay._drain.step()", "self._relay._drain", "from x import _y", "x._y = 1", "x.y._z()"],
)
def test_the_rule_of_private_members_bites(source: str) -> None:
    assert touched(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "class C:\n    def __init__(self): self._x = 1\n    def __eq__(self, o): return o._x",
        "self._inherited()",
        "x.__dict__",
        "def _f(): ...\nmodule._f",
    ],
)
def test_the_rule_lets_a_module_its_own(source: str) -> None:
    assert touched(ast.parse(source)) == set()


RELATIVE = re.compile(
    r"(What|Who|Whom|Whose|Whoever|Whomever|Whatever|Where|Wherever|When|Whenever|How|Which"
    r"|Whichever)\b"
)


@cache
def docstrings() -> list[tuple[str, str]]:
    return [
        (f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text)
        for module, path in modules().items()
        for node in ast.walk(tree_of(module))
        if isinstance(node, Block | ast.Module) and (text := ast.get_docstring(node))
    ]


def test_docstrings_begin_with_their_subject() -> None:
    """In fewer than two of a hundred it may be a clause: "What the gate has granted"."""
    found = [f"{where}: {text}" for where, text in docstrings() if RELATIVE.match(text)]
    assert len(found) < RELATIVES * len(docstrings()), "\n".join(found)
