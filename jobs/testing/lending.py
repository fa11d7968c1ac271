"""Lends one App all that another one has, so that code which holds it works with the other's.

Code of a project holds the App of its module, and each test has one of its own (ADR 0023).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from beatless.app import App


@contextmanager
def acting_as(app: App, other: App) -> Iterator[None]:
    """In this block, code that holds `app` works with the attributes of `other`.

    Its Celery app with its tasks does so too. Objects taken out of `app` before, as in
    `client = app.client`, stays its own.
    """
    own, celery = app.__dict__, app.celery
    celery.finalize()  # its tasks hold it, not the one of whichever test asks for them first
    own_celery = celery.__dict__
    app.__dict__, celery.__dict__ = other.__dict__, other.celery.__dict__
    try:
        yield
    finally:
        app.__dict__, celery.__dict__ = own, own_celery
