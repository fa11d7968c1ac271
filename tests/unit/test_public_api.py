"""What `from beatless import …` gives is decided, not accidental, and costs what is used of it."""

import ast
import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import beatless
from beatless import errors
from beatless.orchestrator import errors as orchestrator_errors


def test_all_is_sorted_and_every_name_is_there_and_documented() -> None:
    assert beatless.__all__ == sorted(beatless.__all__)
    undocumented = [name for name in beatless.__all__ if not getattr(beatless, name).__doc__]
    assert undocumented == []


def test_type_checkers_and_python_are_told_the_same_homes_of_names() -> None:
    tree = ast.parse(inspect.getsource(beatless))
    typed = {
        alias.name: statement.module
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == beatless._MODULES
    assert sorted(typed) == beatless.__all__


def test_the_names_of_the_interface_are_there() -> None:
    interface = (
        "App BadPayload Client Event Fatal Finish Goto Plan Run RunCancelled RunConflict "
        "RunNotFound RunState Settings Snooze StepContext retry step"
    )
    assert set(interface.split()) <= set(beatless.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'beatless' has no attribute 'Plam'"):
        beatless.Plam  # noqa: B018
    with pytest.raises(ImportError, match="Plam"):
        exec("from beatless import Plam")


def test_plans_and_steps_cost_neither_sqlalchemy_nor_celery() -> None:
    """Web applications that only declare plans import them in each of their processes."""
    heavy = {"alembic", "celery", "kombu", "psycopg", "redis", "sqlalchemy"}
    code = (
        "import sys; from beatless import Plan, retry, step; "
        f"sys.exit(bool({heavy} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


@pytest.mark.parametrize("module", [errors, orchestrator_errors], ids=["errors", "of runs"])
def test_every_error_can_be_caught_by_a_name_of_the_package(module: ModuleType) -> None:
    named = {name for name, value in vars(module).items() if _is_error_of(module, value)}
    assert named - {"OrchestratorError"} <= set(beatless.__all__)


def _is_error_of(module: ModuleType, value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, BaseException)
        and value.__module__ == module.__name__
    )
