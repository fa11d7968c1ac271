"""Writes what Sphinx reads: the documents, and a page for each file that one of them links to.

`python .ci/site/sources.py FOLDER`. A link is written as it works in the repository
(`../deploy/README.md`, `../tests/unit/test_plan.py`). In the site, documents outside of docs/
stand below project/, any other file below source/, as a page with its text; a folder is a list of
its files.
The tables of docs/README.md are the navigation, and the exports of `beatless` are the reference.
"""

import ast
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
PICTURE = re.compile(r'<picture>.*?<img alt="(.*?)" src="(.*?)">.*?</picture>', flags=re.DOTALL)
"""A light and a dark image, of which the site has the light one."""
FENCE = re.compile(r"(^ *```.*?^ *```$)", flags=re.DOTALL | re.MULTILINE)
ORPHAN = "---\norphan: true\n---\n"
"""Sphinx does not ask for it in a menu."""
FOLDERS = {"docs/adr": "Decisions"}
"""Titles of the lists of folders."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sql": "sql", ".json": "json"}
CLASSES = {"The test kit": ["beatless.testing.Kit"]}


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    waiting = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    waiting += [path.name for path in ROOT.glob("*.md")]
    seen = set(waiting)
    menu = navigation()
    listed = {entry for entries in menu.values() for entry in entries}
    while waiting:
        source = waiting.pop()
        page = page_of(source)
        write(folder / page, ("" if page in listed else ORPHAN) + content_of(source))
        new = targets(source) - seen
        seen |= new
        waiting += new
    shutil.copytree(ROOT / "docs" / "images", folder / "images")
    trees = [toctree(caption, entries) for caption, entries in menu.items()]
    write(folder / "index.md", content_of("README.md", page="index.md") + "".join(trees))
    write(folder / "reference.rst", reference())


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def page_of(source: str) -> str:
    """The page of the site that shows a file or a folder of the repository."""
    path = ROOT / source
    if source.startswith("docs/images/"):
        return source.removeprefix("docs/")
    if path.is_dir():
        return f"source/{source}/index.md"
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"project/{source}" if path.suffix == ".md" else f"source/{source}.md"


def resolved(source: str, link: str) -> str | None:
    """The file of the repository that a link of `source` names; None: it leads elsewhere."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    elsewhere = "://" in link or target.startswith("..") or not (ROOT / target).exists()
    return None if elsewhere else target


def targets(source: str) -> set[str]:
    """The files that a document or a folder links to, images aside."""
    found = {resolved(source, link) for _, link, _ in LINK.findall(FENCE.sub("", text_of(source)))}
    return {target for target in found if target and not target.startswith("docs/images/")}


def text_of(source: str) -> str:
    """The Markdown of a document, a folder or another file."""
    path = ROOT / source
    if path.suffix == ".md":
        return PICTURE.sub(r"![\1](\2)", path.read_text())
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.name[0] not in "._")
        rows = [f"* [{title(path / n)}]({n})" if n.endswith(".md") else f"* `{n}`" for n in names]
        return f"# {FOLDERS.get(source, source)}\n\n" + "\n".join(rows) + "\n"
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {path.name}\n\n`{source}`\n\n~~~~~~{language}\n{path.read_text()}\n~~~~~~\n"


def title(path: Path) -> str:
    return path.read_text().partition("\n")[0].lstrip("# ")


def content_of(source: str, page: str = "") -> str:
    """The text of a file, whose links lead to pages of the site."""
    here = posixpath.dirname(page or page_of(source)) or "."
    base = source + "/" if (ROOT / source).is_dir() else source

    def led(match: re.Match[str]) -> str:
        target = resolved(base, match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(page_of(target), here) + match[3]

    parts = FENCE.split(text_of(source))
    return "".join(part if number % 2 else LINK.sub(led, part) for number, part in enumerate(parts))


def navigation() -> dict[str, list[str]]:
    """The pages of each table of docs/README.md. What is in none of them is not in the menu."""
    text = (ROOT / "docs" / "README.md").read_text()
    menu: dict[str, list[str]] = {}
    for part in re.split(r"^\| (?=to )", text, flags=re.MULTILINE)[1:]:
        entries = menu[part.partition("|")[0].strip().capitalize()] = []
        for _, link, _ in LINK.findall(part):
            target = resolved("docs/README.md", link)
            if target and page_of(target) not in entries and target != "README.md":
                entries.append(page_of(target))
    return {**menu, "Reference": ["reference.rst"]}


def toctree(caption: str, entries: list[str]) -> str:
    head = ["", "```{toctree}", ":hidden:", f":caption: {caption}", ""]
    return "\n".join([*head, *entries, "```", ""])


def reference() -> str:
    """Directives for every exported name, errors apart, and for what users call on objects."""
    tree = ast.parse((ROOT / "jobs" / "__init__.py").read_text())
    modules = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    )
    errors = sorted(name for name, module in modules.items() if module.endswith(".errors"))
    names = sorted(set(modules) - set(errors))
    text = "Reference\n=========\n\nMade from the docstrings, whose examples the suite executes.\n"
    for heading, paths in {
        "Names of beatless": [f"{modules[name]}.{name}" for name in names],
        "Errors": [f"{modules[name]}.{name}" for name in errors],
        **CLASSES,
    }.items():
        text += f"\n{heading}\n{'-' * len(heading)}\n"
        for path in dict.fromkeys(paths):
            text += f"\n.. autoclass:: {path}\n   :members:\n"
    return text


main(Path(sys.argv[1]))
