"""Rules of the house that no linter knows: tests neither sleep, nor pretend, nor give up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "pytest_beatless.py",
    *(
        path
        for folder in ("jobs", "orchestrator", "outbox", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
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


def in_memory_doors(source: str) -> list[str]:
    """Where a source puts something of its own in the place of broker or bus, as line numbers.

    A publisher that passes on to another one may be written: it can note, and it can fail.
    """
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef(body=body):
                found += [
                    method
                    for method in body
                    if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
                    and method.name == "publish"
                    and not passes_on(method)
                ]
            case ast.keyword(arg="publish" | "task_always_eager"):
                found.append(node)
            case ast.Attribute(attr="publish" | "task_always_eager", ctx=ast.Store()):
                found.append(node)
            case ast.Call(func=ast.Name("setattr") | ast.Attribute(attr="setattr"), args=args):
                found += [
                    each
                    for each in args
                    if isinstance(each, ast.Constant)
                    and str(each.value).rpartition(".")[2] in ("publish", "task_always_eager")
                ]
            case ast.Constant(value=str(text)) if text.startswith(IN_MEMORY_URLS):
                found.append(node)
    return sorted(f"line {node.lineno}" for node in found)


IN_MEMORY_URLS = ("memory:" + "//", "cache+memory:" + "//")


def passes_on(method: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "publish"
        for node in ast.walk(method)
    )


WITH_SERVERS = [
    path
    for folder in ("tests/integration", "tests/cli", "tests/stress", "tests/docker", "deploy/tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_tests_with_servers_publish_through_them():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in WITH_SERVERS
        if (lines := in_memory_doors(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "class Door:\n    def publish(self, messages):\n        self.messages += messages",
        "class Door:\n    async def publish(self, messages): ...",
        "door = SimpleNamespace(publish=print)",
        "relay.events.publish = print",
        "monkeypatch.setattr(door, 'publish', print)",
        "monkeypatch.setattr('outbox.publishers.RedisEventPublisher.publish', print)",
        "app.conf.task_always_eager = True",
        "app.conf.update(task_always_eager=True)",
        f"settings(broker_url='{IN_MEMORY_URLS[0]}')",
    ],
)
def test_the_rule_against_publishers_in_memory_bites(source):
    assert in_memory_doors(source)


@pytest.mark.parametrize(
    "source",
    [
        "class Door:\n    def publish(self, messages):\n        self.real.publish(messages)",
        "client.publish('channel', 'x')",
    ],
)
def test_the_rule_lets_a_tap_on_the_real_publisher_pass(source):
    assert in_memory_doors(source) == []


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
