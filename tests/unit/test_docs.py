"""What the documents point at exists, and their Python is Python."""

import ast
import inspect
import re
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "benchmarks/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)


def prose(path: Path) -> str:
    """Without blocks of code, whose comments look like headings."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    }


def test_every_link_of_a_document_leads_somewhere() -> None:
    missing = []
    for path in DOCUMENTS:
        text = prose(path)
        images = re.findall(r'\b(?:src|srcset)="([^"]+)"', text)
        for link in re.findall(r"\]\(([^)\s]+)\)", text) + images:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if "://" not in link and (
                not target.exists() or (anchor and anchor not in anchors(target))
            ):
                missing.append((path, link))
    assert missing == []


def test_each_decision_has_a_number_of_its_own() -> None:
    numbers = [path.name[:4] for path in (ROOT / "docs" / "adr").glob("*.md")]
    assert sorted(numbers) == sorted(set(numbers))


def test_every_page_is_in_the_list_of_pages() -> None:
    """Of which the menu of the site is made."""
    listed = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(page for page in pages if f"]({page})" not in listed) == []


FOLDERS = "jobs|orchestrator|outbox|tests|deploy|docs|benchmarks|examples"

IMAGINED = {"tests/outbox"}
"""A folder that there must not be, in ADR 1."""


def test_every_file_that_a_document_names_is_there() -> None:
    missing = [
        (path, name)
        for path in DOCUMENTS
        for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", path.read_text())
        if name not in IMAGINED and not (ROOT / name).exists()
    ]
    assert missing == []


def test_the_python_of_a_document_compiles() -> None:
    for path in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
            ast.parse(block, filename=str(path))


def test_the_page_about_http_names_every_type_of_event_to_readers_and_to_browsers() -> None:
    from beatless.orchestrator.events import EventType

    text = (ROOT / "docs" / "http.md").read_text()
    section = text.partition("### In a browser")[2].partition("\n#")[0]
    listed = re.findall(r"^\| `([A-Z]\w+)` \|", section, flags=re.MULTILINE)
    (types,) = re.findall(r"const TYPES = \[(.*?)\]", section, flags=re.DOTALL)
    assert sorted(listed) == sorted(re.findall(r'"(\w+)"', types)) == sorted(EventType)


def test_the_client_in_a_browser_of_the_page_about_http_is_that_of_the_examples() -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    for file, begin in (("follow.js", "const TYPES"), ("follow_all.js", "const logAll")):
        (shown,) = re.findall(rf"```js\n({begin}.*?)```", text, flags=re.DOTALL)
        _, _, code = (ROOT / "examples" / file).read_text().partition("\n")
        assert code == shown


def test_the_page_of_the_template_listens_to_every_type_of_event() -> None:
    from beatless.orchestrator.events import EventType

    page = (ROOT / "jobs" / "templates" / "fastapi" / "shop" / "page.html.template").read_text()
    (types,) = re.findall(r"const TYPES = \[(.*?)\]", page, flags=re.DOTALL)
    assert sorted(re.findall(r'"(\w+)"', types)) == sorted(EventType)


def test_the_first_page_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["plans.md", "python.md"])
def test_the_signatures_of_the_documents_are_those_of_the_code(page: str) -> None:
    """Of the calls of a function, and of the elements of lists, that are written in full."""
    from beatless import RunContext, approve, child, map_, wait

    text = (ROOT / "docs" / page).read_text()
    elements = {each.__name__: each for each in (approve, child, map_, wait)}
    different = []
    for of_run, name, shown in re.findall(r"`(run\.)?(\w+)\(([^`]*=[^`]*)\)`", text):
        call = getattr(RunContext, name, None) if of_run else elements.get(name)
        if call is None or not re.fullmatch(r"[*\w]+(, [*\w]+(=[\w\"]+)?)*", shown):
            continue  # an example of a call
        known = [
            each for each in inspect.signature(call).parameters.values() if each.name != "self"
        ]
        bare = inspect.Signature([each.replace(annotation=each.empty) for each in known])
        if f"({shown})" != str(bare).replace("'", '"').replace(" /,", ""):
            different.append(f"{name}({shown}) is {bare}")
    assert different == []


def test_every_setting_is_documented() -> None:
    from beatless import Settings

    text = (ROOT / "docs" / "settings.md").read_text()
    for name in Settings.__dataclass_fields__:
        # What the environment cannot hold is a keyword.
        variable = name not in ("database_password", "redis_password", "broker_password")
        assert f"`BEATLESS_{name.upper()}`" in text if variable else f"{name}=" in text


def test_every_command_is_in_the_help_of_the_interface() -> None:
    from beatless.cli import cli

    documents = "".join(path.read_text() for path in DOCUMENTS)
    for name in cli.list_commands(click.Context(cli)):
        assert re.search(rf"`(?:beatless )?{name}\b|beatless {name}\b", documents), name
