"""Tests of the shop work in a schema of their own, with real commits."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

import django
import pytest

django.setup()  # before tests import models; pytest-django does it as well


@pytest.fixture
def db(beatless_django):
    """`admin_client` and tests ask for this one."""


@pytest.fixture
def transactional_db(db):
    """`live_server` asks for this one."""
