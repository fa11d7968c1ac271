"""docs/architecture.md shows the tree as it is, and the import contracts hold all of it."""

import ast
import graphlib
import re

from tests.architecture import (
    PACKAGE,
    PLUGIN,
    ROOT,
    children,
    contracts,
    imports,
    modules,
    packages,
    parts,
    tables,
    tree_of,
)

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_tables_of_the_page_are_those_of_the_tree() -> None:
    assert parts(PAGE)[1] == tables(), "run: make architecture"


def test_each_module_stands_once_in_the_tables() -> None:
    rows = re.findall(r"^\| \d+ \| \[`(.+?)`\]", parts(PAGE)[1], re.MULTILINE)
    files = {path.relative_to(ROOT).as_posix() for path in modules().values()}
    outermost = {"jobs/__init__.py"}  # the package itself, whose modules the first table lists
    shown = [f"{name}__init__.py" if name.endswith("/") else name for name in rows]
    assert sorted(shown) == sorted(files - outermost)


def test_the_walk_names_files_and_functions_that_are_there() -> None:
    """`path` **name** or **Class.name**: the name is defined in that file."""
    named = re.findall(
        r"`((?:jobs|orchestrator|outbox)/[\w/]+\.(?:py|sql))`(?: \*\*([\w.]+)\*\*)?", PAGE
    )
    assert len([name for _, name in named if name]) >= 8
    missing = []
    for file, name in named:
        path = ROOT / file
        if not path.exists():
            missing.append(file)
        elif name and not all(defines(path.read_text(), part) for part in name.split(".")):
            missing.append(f"{file} {name}")
    assert missing == []


def defines(source: str, name: str) -> bool:
    return (
        re.search(
            rf"^\s*(?:async def|def|class|-- name:|-- fragment:) {name}\b", source, re.MULTILINE
        )
        is not None
    )


def test_each_module_has_a_layer() -> None:
    layered = contracts()
    assert {PACKAGE, "beatless.orchestrator", "beatless.outbox"} <= layered.keys()
    for package, layers in layered.items():
        assert sorted(module for layer in layers for module in layer) == sorted(children(package))


def test_imports_go_down_also_those_by_a_name_in_a_string() -> None:
    upward = []
    for package, layers in contracts().items():
        depth = {module: number for number, layer in enumerate(layers) for module in layer}
        for module in modules():
            for other in imports(module):
                above, below = (owner(package, name) for name in (module, other))
                if above and below and above != below and depth[above] >= depth[below]:
                    upward.append(f"{module} imports {other}")
    assert upward == []


def owner(package: str, module: str) -> str | None:
    """The direct child of a package that a module is, or is in."""
    if not module.startswith(f"{package}."):
        return None
    return ".".join(module.split(".")[: package.count(".") + 2])


def test_no_module_imports_itself_by_way_of_others() -> None:
    """import-linter compares siblings; this compares modules, whatever way they are imported."""
    graphlib.TopologicalSorter({module: imports(module) for module in modules()}).prepare()


def test_the_lazy_names_of_the_package_are_for_its_users() -> None:
    """Inside, each name is imported from its own module: else all would import all."""
    assert [name for name in modules() if PACKAGE in imports(name)] == []
    assert len(imports(PACKAGE)) > 10


def test_the_pytest_plugin_stands_above_everything_and_imports_nothing_before_a_fixture() -> None:
    """import-linter takes no single module as a root: its contracts cannot hold this one."""
    at_import = {
        name
        for node in tree_of(PLUGIN).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert not [name for name in at_import if name and name.split(".")[0] == PACKAGE]
    assert [name for name in modules() if PLUGIN in imports(name)] == []
    assert imports(PLUGIN)


def test_each_package_of_the_tree_has_a_table() -> None:
    for package in packages():
        assert f"`{package}`, layers" in PAGE
