"""The module tables of docs/architecture.md, from import contracts, imports and docstrings.

    python -m tests.architecture docs/architecture.md

`make architecture` rewrites the tables; tests/unit/test_architecture.py compares them.
"""

import ast
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "beatless"
PLUGIN = "pytest_beatless"
FOLDERS = {PACKAGE: "jobs", "beatless.orchestrator": "orchestrator", "beatless.outbox": "outbox"}
"""The folders of the package and of the two subpackages that stand beside it (ADR 0050)."""

BEGIN = "<!-- Written by `make architecture`; the suite compares it. -->"
END = "<!-- End of what `make architecture` writes. -->"


@cache
def modules() -> dict[str, Path]:
    """The file of each module, by its import name."""
    found = {PLUGIN: ROOT / "pytest_beatless.py"}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not any((ROOT / folder / Path(*parts[:n])).is_symlink() for n in range(len(parts))):
                name = ".".join((package, *parts)).removesuffix(".__init__")
                found[name] = path
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports.

    Wherever it does: also in functions, for type checkers only, and by a name in a string, if it
    imports by name (`importlib`): the lazy `__init__`, the commands of the command line.
    """
    nodes = list(ast.walk(tree_of(module)))
    names: set[str] = set()
    for node in nodes:
        match node:
            case ast.Import(aliases):
                names.update(alias.name for alias in aliases)
            case ast.ImportFrom(module=str(origin), names=aliases):
                for alias in aliases:
                    submodule = f"{origin}.{alias.name}"
                    names.add(submodule if submodule in modules() else origin)
    if names & {"importlib", "importlib.util"}:
        names |= {
            node.value
            for node in nodes
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(f"{PACKAGE}.")
        }
    return frozenset(names & modules().keys() - {module})


def contracts() -> dict[str, list[list[str]]]:
    """The layers that pyproject.toml gives to each package, from the top, as full module names."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {
        container: [
            [f"{container}.{name.strip()}" for name in layer.split("|")]
            for layer in contract["layers"]
        ]
        for contract in config["contracts"]
        if contract["type"] == "layers"
        for container in contract["containers"]
    }


def children(package: str) -> list[str]:
    return [
        name
        for name in modules()
        if name.startswith(f"{package}.") and "." not in name.removeprefix(f"{package}.")
    ]


def inside(module: str) -> list[str]:
    return [name for name in modules() if name == module or name.startswith(f"{module}.")]


def layers(package: str) -> list[list[str]]:
    """The modules of a package, from the top: each imports only from layers below its own.

    By its import contract; without one, each as low as its imports allow.
    """
    if package in (given := contracts()):
        return given[package]
    siblings = children(package)
    below = {
        module: {
            other
            for other in siblings
            if other != module
            and any(imports(each) & set(inside(other)) for each in inside(module))
        }
        for module in siblings
    }
    sorter = graphlib.TopologicalSorter(below)
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = sorter.get_ready()
        found.append(sorted(ready))
        sorter.done(*ready)
    return found[::-1]


def packages() -> Iterator[str]:
    """Those with modules in them, each after the one that it is in."""
    for name in modules():
        if modules()[name].name == "__init__.py" and children(name):
            yield name


def summary(module: str) -> str:
    """The first sentence of its docstring."""
    text = " ".join((ast.get_docstring(tree_of(module)) or "").split("\n\n")[0].split())
    sentence, stop, _ = text.partition(". ")
    return (sentence + stop.strip()).replace("|", "\\|")


def row(layer: str, module: str) -> str:
    path = modules()[module].relative_to(ROOT)
    shown = f"{path.parent}/" if path.name == "__init__.py" else str(path)
    return f"| {layer} | [`{shown}`](../{shown}) | {summary(module)} |"


def table(package: str) -> Iterator[str]:
    yield from ("| layer | module | its job |", "|---|---|---|")
    if package == PACKAGE:
        yield row("0", PLUGIN)
    for number, layer in enumerate(layers(package), 1):
        for module in layer:
            yield row(str(number), module)


def tables() -> str:
    lines = [BEGIN]
    for package in packages():
        folder = modules()[package].parent.relative_to(ROOT)
        kind = "by contract" if package in contracts() else "by its imports"
        lines += ["", f"### `{folder}/`: `{package}`, layers {kind}", "", *table(package)]
    return "\n".join([*lines, "", END])


def parts(page: str) -> tuple[str, str, str]:
    """The text before the tables, the tables, and the text after them."""
    before, begin, rest = page.partition(BEGIN)
    inner, end, after = rest.partition(END)
    return before, begin + inner + end, after


if __name__ == "__main__":
    target = Path(sys.argv[1])
    before, _, after = parts(target.read_text())
    target.write_text(before + tables() + after)
