"""Our app in Django's registry: it keeps the project's App, and migrates with Django."""

import threading
from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.db import connections
from django.db.models.signals import post_migrate

from beatless import migrations
from beatless.app import App
from beatless.declared import store_declared
from beatless.django.checks import check_project
from beatless.django.databases import url_of
from beatless.django.project import alias, given, new_app
from beatless.outbox.sessions import OWN
from beatless.postgres import engine

MIGRATES = "beatless.django.migrate"
"""The id of our receiver of Django's signal `post_migrate`."""


class BeatlessConfig(AppConfig):  # type: ignore[misc]  # Django has no types
    """Made by Django at its start. The App is made when it is first used."""

    name = "beatless.django"
    label = "beatless"
    verbose_name = "beatless"

    def ready(self) -> None:
        self._making = threading.RLock()
        self._app: App | None = None
        self._made = ""
        self._names = {each: connections[each].settings_dict["NAME"] for each in connections}
        checks.register(check_project)
        self.connect(post_migrate)

    def connect(self, post_migrate: Any) -> None:
        """Migrate our schema after Django's own."""
        post_migrate.connect(self.migrate, sender=self, dispatch_uid=MIGRATES)

    def disconnect(self, post_migrate: Any) -> None:
        """Leave our schema as it is."""
        post_migrate.disconnect(sender=self, dispatch_uid=MIGRATES)

    @property
    def app(self) -> App:
        """The App of the project. It follows Django to its test database, and back.

        Raises BadSetting and PlanError.
        """
        with self._making:
            wrapper = connections[alias()]
            url = url_of(wrapper)
            test = wrapper.settings_dict["NAME"] != self._names[wrapper.alias]
            if self._app is None:
                self._app, self._made = new_app(test=test), url
                self._settings = self._app.settings
            elif url != self._made and self._app.settings is self._settings:
                # Not one that the kit has lent its test's. Modules hold the object itself.
                fresh = new_app(test=test)
                self._app.close()
                self._app.__dict__ = dict(vars(fresh))
                self._settings, self._made = fresh.settings, url
            return self._app

    def migrate(self, *, using: str, verbosity: int = 1, **_: Any) -> None:
        """Bring our schema to this version after each `manage.py migrate` of its database.

        Also after those that make test databases. BEATLESS = {"MIGRATE": False} leaves it to
        `manage.py beatless migrate`.
        """
        if using != alias() or not given().get("MIGRATE", True):
            return
        app = self.app
        settings = app.settings
        connecting = engine(
            settings.listen_url,
            "beatless migrate",
            direct=True,
            session=OWN,
            password=settings.password("database"),
        )
        try:
            found = migrations.migrate(connecting, settings.schema)
        finally:
            connecting.dispose()
        changes = store_declared(app)
        if verbosity > 0:
            for change in changes:
                print(f"  {change}")  # noqa: T201 - as Django's
        if verbosity > 1:
            print(f"  schema {settings.schema} is at migration {found}")  # noqa: T201 - as Django's
