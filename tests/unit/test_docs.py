"""What the documents point at exists, and their Python is Python."""

import ast
import re
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [
        link for link in links if "://" not in link and not (path.parent / link).resolve().exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_document_compiles(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
        ast.parse(block)


def test_every_setting_is_documented() -> None:
    from jobs import Settings

    text = (ROOT / "docs" / "settings.md").read_text()
    for name in Settings.__dataclass_fields__:
        assert f"`BEATLESS_{name.upper()}`" in text


def test_every_command_is_in_the_help_of_the_interface() -> None:
    from jobs.cli import cli

    documents = "".join(path.read_text() for path in DOCUMENTS)
    for name in cli.list_commands(click.Context(cli)):
        assert re.search(rf"`(?:beatless )?{name}\b|beatless {name}\b", documents), name
