"""Rules of the house that no linter knows: tests neither sleep, nor pretend, nor give up."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "pytest_beatless.py",
    *(
        path
        for folder in (
            *("jobs", "orchestrator", "outbox"),
            *("tests", "deploy", "benchmarks", "examples"),
        )
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]

TESTS = (ROOT / "tests", ROOT / "deploy")

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


def words(source: str) -> set[str]:
    """All of its names, and more. Python reads letters of other forms as the ordinary ones."""
    return set(re.findall(r"\w+", normalize("NFKC", source)))


def uses(source: str, last: set[str]) -> Iterator[str]:
    """Dotted names that a source imports, and those it uses that end with one of `last`.

    Of a source that has none of those words nothing: to parse the whole tree takes seconds.
    """
    if not last & words(source):
        return
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names):
                yield module or ""
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Attribute(attr=name) if name in last:
                yield ast.unparse(node)


PAUSES = {
    *("jobs/local/server.py", "jobs/local/stack_file.py"),
    *("jobs/streams/streams.py", "jobs/streams/subscription.py", "jobs/streams/tail.py"),
}
"""In calls that end by a deadline or with the thread of their caller, and that no `stop()` ends."""


def offences(source: str, forbidden: set[str]) -> set[str]:
    return forbidden & set(uses(source, {name.rpartition(".")[2] for name in forbidden}))


def test_nothing_sleeps_pretends_or_is_skipped():
    found = {
        str(path.relative_to(ROOT)): offending
        for path in SOURCES
        if (
            offending := offences(
                path.read_text(),
                FORBIDDEN_EVERYWHERE
                | (FORBIDDEN_IN_TESTS if any(map(path.is_relative_to, TESTS)) else set()),
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
    if not any(word in normalize("NFKC", source).lower() for word in DOORS):
        return []
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
            case ast.keyword(arg=str(name), value=value) if is_door(name) or fakes(name, value):
                found.append(node)
            case ast.Attribute(attr=name, ctx=ast.Store()) if is_door(name):
                found.append(node)
            case ast.Subscript(slice=key, ctx=ast.Store()) if is_eager(key):
                found.append(node)
            case ast.Assign(targets=targets, value=value) if any(
                fakes(name_of(target), value) for target in targets
            ):
                found.append(node)
            case ast.Dict(keys=keys, values=values):
                found += [
                    key
                    for key, value in zip(keys, values, strict=True)
                    if key is not None and (is_eager(key) or fakes(text_of(key), value))
                ]
            case ast.Tuple(elts=[key, value]) if is_eager(key) or fakes(text_of(key), value):
                found.append(node)
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name), args=args) if (
                name in SETTERS
            ):
                found += [each for each in args if is_door(text_of(each).rpartition(".")[2])]
            case ast.Constant(value=str(text)) if any(url in text.lower() for url in MEMORY):
                found.append(node)
            case ast.Import(names=names) if any(alias.name in MEMORY for alias in names):
                found.append(node)
            case ast.ImportFrom(module=str(module), names=names) if any(
                {module, f"{module}.{alias.name}"} & set(MEMORY) for alias in names
            ):
                found.append(node)
    return sorted(f"line {node.lineno}" for node in found)


DOORS = ("publish", "always_eager", "memory")
"""Each of them has one of these in its text."""

MEMORY = ("memory:" + "//", "kombu.transport." + "memory")

SETTERS = {"setattr", "setitem", "setenv", "setdefault", "delattr", "__setitem__"}


def is_door(name: str) -> bool:
    return name == "publish" or name.lower().endswith("always_eager")


def is_eager(node: ast.AST) -> bool:
    return text_of(node).lower().endswith("always_eager")


def fakes(name: str, value: ast.AST) -> bool:
    """Whether a transport or broker of this name is the one in memory: kombu takes the bare name.

    Its URLs are found wherever they are.
    """
    about = any(word in name.lower() for word in ("transport", "broker"))
    return about and text_of(value).lower() == "memory"


def text_of(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def name_of(target: ast.AST) -> str:
    match target:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(slice=key):
            return text_of(key)
    return ""


def passes_on(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it hands its messages to another publisher, whenever it returns."""
    given = [argument.arg for argument in method.args.args][1:]
    for statement in method.body:
        if isinstance(statement, ast.Expr | ast.Return | ast.Assign) and given:
            called = statement.value
            if isinstance(called, ast.Await):
                called = called.value
            match called:
                case ast.Call(
                    func=ast.Attribute(attr="publish", value=owner), args=[ast.Name(name), *_]
                ) if name == given[0] and not (isinstance(owner, ast.Name) and owner.id == "self"):
                    return True
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            return False
    return False


QUOTING = {Path(__file__), Path(__file__).with_name("test_lint_rules.py")}
"""They have such code as text, to show that the rules bite."""

WITH_SERVERS = [
    path
    for folder in (*TESTS, ROOT / "benchmarks", ROOT / "examples")
    for path in sorted(folder.rglob("*.py"))
    if path not in QUOTING
]

EXAMINED = {
    "tests/integration/test_doctor.py": 1,
    "tests/integration/test_kit_brokers.py": 6,
    "tests/unit/test_celery_settings.py": 2,
    "tests/unit/test_threads.py": 1,
}
"""What the doctor must find, what the kit lets other Celery apps do, what is refused, what a thread
survives: nothing of ours there."""


def test_no_product_code_waits_for_an_event_that_nobody_can_set():
    product = [ROOT / folder for folder in ("jobs", "orchestrator", "outbox")]
    waiting = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(path.is_relative_to(folder) for folder in product)
        and offences(path.read_text(), {"threading.Event().wait", "Event().wait"})
    }
    assert waiting == PAUSES


def test_tests_with_servers_publish_through_them():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in WITH_SERVERS
        if (lines := in_memory_doors(path.read_text()))
    }
    assert {path: len(lines) for path, lines in found.items()} == EXAMINED, found


def test_every_test_of_this_project_is_one_of_them():
    folders = [
        folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    ]
    tests = {path for folder in folders for path in folder.rglob("test_*.py")}
    assert {path.parent.name for path in WITH_SERVERS} >= {"integration", "browser", "netns"}
    assert tests - set(WITH_SERVERS) == QUOTING
    assert tests - set(SOURCES) == set()


@pytest.mark.parametrize(
    "source",
    [
        "class Door:\n    def publish(self, messages):\n        self.messages += messages",
        "class Door:\n    async def publish(self, messages): ...",
        # What is called never, not always, for other messages, or by itself.
        "class Door:\n    def publish(self, messages):\n        if 0: self.real.publish(messages)",
        (
            "class Door:\n    def publish(self, messages):\n        return\n"
            "        self.real.publish(messages)"
        ),
        (
            "class Door:\n    def publish(self, messages):\n        if self.shut: return\n"
            "        self.real.publish(messages)"
        ),
        "class Door:\n    def publish(self, messages):\n        self.real.publish([])",
        "class Door:\n    def publish(self, messages):\n        self.publish(messages)",
        (
            "class Door:\n    def publish(self, messages):\n"
            "        def real(): self.real.publish(messages)"
        ),
        "door = SimpleNamespace(publish=print)",
        "relay.events.publish = print",
        "monkeypatch.setattr(door, 'publish', print)",
        "monkeypatch.setattr('beatless.outbox.publishers.RedisEventPublisher.publish', print)",
        "app.conf.task_always_eager = True",
        "app.conf.update(task_always_eager=True)",
        "app.conf.update({'task_always_eager': True})",
        "app.conf |= {'task_always_eager': True}",
        "app.conf.update([('task_always_eager', True)])",
        "app.conf['task_always_eager'] = True",
        "app.conf.setdefault('task_always_eager', True)",
        "monkeypatch.setitem(app.conf, 'task_always_eager', True)",
        "monkeypatch.setenv('CELERY_TASK_ALWAYS_EAGER', '1')",
        "Celery(CELERY_ALWAYS_EAGER=True)",
        f"settings(broker_url='{MEMORY[0]}')",
        f"environ = {{'BEATLESS_BROKER_URL': 'cache+{MEMORY[0]}'}}",
        f"command = 'BEATLESS_BROKER_URL={MEMORY[0]}localhost beatless relay'",
        f"url = f'{MEMORY[0].upper()}{{name}}'",
        "Connection(transport='memory')",
        "app.conf.update({'broker_transport': 'memory'})",
        "app.conf.broker_url = 'memory'",
        "app.conf['broker_url'] = 'memory'",
        f"import {MEMORY[1]}",
        "from kombu.transport import memory",
        "from kombu.transport.memory import Transport",
        f"Connection(transport='{MEMORY[1]}:Transport')",
    ],
)
def test_the_rule_against_publishers_in_memory_bites(source):
    assert in_memory_doors(source)


@pytest.mark.parametrize(
    "source",
    [
        "class Door:\n    def publish(self, messages):\n        self.real.publish(messages)",
        (
            "class Door:\n    async def publish(self, messages):\n"
            "        if self.shut: raise ValueError\n        await super().publish(messages)"
        ),
        "client.publish('channel', 'x')",
        "assert app.conf.task_always_eager is False",
        "limits = {'memory': '1Gi', 'cpu': 1}",
        "resources = dict(memory='memory')",
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
        and not begins_with_text(source)
    ]
    assert undocumented == []


def begins_with_text(source: str) -> bool:
    """Whether its first statement is a docstring: of a whole tree, much sooner than by parsing."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    first = next(token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))
    ends = first.type == tokenize.STRING and next(tokens).type in (
        tokenize.NEWLINE,
        tokenize.COMMENT,
    )
    return ends and bool(ast.get_docstring(ast.parse(first.string)))


@pytest.mark.parametrize(
    "source",
    ["", "# text\n", "import ast\n'text'\n", "' '\n", "f'text'\n", "b'text'\n", "'text'.split()\n"],
)
def test_a_module_without_a_docstring_says_nothing(source):
    assert not begins_with_text(source)
    assert begins_with_text(f"# license\n\n'It says.'\n{source}")
