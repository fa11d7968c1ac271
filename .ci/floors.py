"""Prints the oldest of everything that pyproject.toml allows a user, as constraints for pip."""

import re
import tomllib
from pathlib import Path

USERS = ("api", "flower", "http", "otel", "dev", "test")
"""The extras that are installed beside a user's own packages; others are for this suite."""

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in USERS:
    wanted += project["optional-dependencies"][extra]
floors = {}
for requirement in wanted:
    name, _, floor = re.fullmatch(r"([\w-]+)(\[.*\])?>=([\d.]+)[^>]*", requirement).groups()
    floors[name] = floor
for name, floor in sorted(floors.items()):
    print(f"{name}=={floor}")
