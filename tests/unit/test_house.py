"""Rules of the house that no linter knows: tests neither sleep, nor pretend, nor give up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("jobs", "orchestrator", "outbox", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

FORBIDDEN_EVERYWHERE = {"time.sleep", "unittest.mock", "mock"}
FORBIDDEN_IN_TESTS = {
    "asyncio.sleep",
    "pytest.mark.flaky",
    "pytest.mark.skip",
    "pytest.mark.skipif",
    "pytest.mark.xfail",
    "pytest.skip",
    "pytest.xfail",
}


def uses(source: str) -> Iterator[str]:
    """Dotted names that a source uses or imports."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names):
                yield module or ""
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Attribute():
                yield ast.unparse(node)


def offences(source: str, forbidden: set[str]) -> set[str]:
    return forbidden & set(uses(source))


def test_nothing_sleeps_pretends_or_is_skipped():
    found = {
        str(path.relative_to(ROOT)): offending
        for path in SOURCES
        if (
            offending := offences(
                path.read_text(),
                FORBIDDEN_EVERYWHERE
                | (FORBIDDEN_IN_TESTS if path.is_relative_to(ROOT / "tests") else set()),
            )
        )
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.sleep(1)",
        "from time import sleep",
        "from unittest import mock",
        "import unittest.mock",
        "import mock",
        "import pytest\n@pytest.mark.skip\ndef test(): ...",
        "async def f():\n    await asyncio.sleep(0.1)",
    ],
)
def test_the_rule_bites(source):
    assert offences(source, FORBIDDEN_EVERYWHERE | FORBIDDEN_IN_TESTS)


def test_no_folder_of_tests_is_a_package():
    """`tests/outbox/__init__.py` would stand in for `outbox`."""
    assert [path for path in SOURCES if path.match("tests/**/__init__.py")] == []


def test_every_module_says_what_it_is_for():
    undocumented = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.name != "__main__.py"
        and (source := path.read_text())
        and not ast.get_docstring(ast.parse(source))
    ]
    assert undocumented == []
