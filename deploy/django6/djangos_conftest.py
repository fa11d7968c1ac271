"""Runs Django's own tests of its tasks under pytest, each with a schema and a kit of its own."""

import os
from pathlib import Path

os.environ["DJANGO_SETTINGS_MODULE"] = "settings"

import django
import pytest
from django.test import SimpleTestCase, TransactionTestCase
from django.test.utils import setup_test_environment

django.setup()
setup_test_environment()

import harness


@pytest.fixture(autouse=True)
def kit(request, beatless):
    if issubclass(request.cls, TransactionTestCase):
        request.getfixturevalue("beatless_django")
    harness.kits.append(beatless)
    yield
    harness.kits.pop()


def pytest_collection_modifyitems(items):
    assert all(issubclass(each.cls, SimpleTestCase) for each in items)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        outcome = "failed" if report.failed else "passed"
        name = report.nodeid.removeprefix("tasks/")
        with Path("outcomes.txt").open("a") as outcomes:
            outcomes.write(f"{name} {outcome}\n")
