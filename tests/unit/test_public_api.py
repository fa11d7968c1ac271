"""What `from beatless import …` gives is decided, not accidental."""

import importlib
import types

import pytest

PUBLIC = ["jobs", "orchestrator", "outbox"]


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_is_what_the_package_itself_defines(name):
    package = importlib.import_module(name)
    found = [
        member
        for member, value in vars(package).items()
        if not member.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert package.__all__ == sorted(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    package = importlib.import_module(name)
    undocumented = [
        member
        for member in package.__all__
        if callable(getattr(package, member)) and not getattr(package, member).__doc__
    ]
    assert undocumented == []


def test_the_names_of_the_interface_are_there():
    jobs = importlib.import_module("jobs")
    interface = (
        "App BadPayload Client Event Fatal Finish Goto Plan Run RunCancelled RunConflict "
        "RunNotFound RunState Settings Snooze StepContext retry step"
    )
    assert set(interface.split()) <= set(jobs.__all__)
