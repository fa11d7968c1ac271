"""`beatless init`: a small project of the user's own, which works as it is."""

import json
from importlib import metadata
from pathlib import Path

import click

from beatless.cli.environment import Environment
from beatless.errors import BadRequest

TEMPLATES = Path(__file__).parents[1] / "templates"
SUFFIX = ".template"
EVERY = "every"
"""The folder of what each project has; beside it one folder for each template."""

EXTRAS = {"celery": "dev,test", "fastapi": "dev,test", "django": "dev,django,test"}
"""What each template needs of this package."""


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--template",
    type=click.Choice(tuple(EXTRAS)),
    default="celery",
    show_default=True,
    help="What the project is: Celery with SQLAlchemy, a FastAPI app, or a Django project.",
)
@click.pass_obj
def init(env: Environment, directory: Path, template: str) -> None:
    """Write a small project into DIRECTORY: a plan, its tests, a Makefile, a compose file."""
    if directory.exists() and not directory.is_dir():
        raise BadRequest("DIRECTORY", f"{directory} is a file: choose another name")
    if directory.exists() and any(directory.iterdir()):
        raise BadRequest("DIRECTORY", f"{directory} is not empty: choose a new one")
    values = {"@NAME@": directory.resolve().name, "@BEATLESS@": requirement(EXTRAS[template])}
    written = []
    for source, path in files(template):
        text = source.read_text()
        for name, value in values.items():
            text = text.replace(name, value)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
        written.append(str(path))
    if env.as_json:
        env.document({"directory": str(directory), "files": written})
        return
    for name in written:
        click.echo(f"{directory / name}")
    env.note(f"now: cd {directory} && make test")


def files(template: str) -> list[tuple[Path, Path]]:
    """The files of a template, and where each is in a project, by that place."""
    found = [
        (source, source.relative_to(folder).with_suffix(""))
        for folder in (TEMPLATES / EVERY, TEMPLATES / template)
        for source in folder.rglob(f"*{SUFFIX}")
    ]
    return sorted(found, key=lambda each: each[1])


def requirement(extras: str) -> str:
    """The pip requirement of this beatless: by version, or by the path it was installed from."""
    distribution = metadata.distribution("beatless")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    elif "url" in origin:
        source = origin["url"]
    else:
        return f"beatless[{extras}]=={distribution.version}"
    return f"beatless[{extras}] @ {source}"
