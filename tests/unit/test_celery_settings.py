"""The configuration of Celery is what docs/workers.md says, on both brokers."""

import ast
import logging
import operator
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import _state
from celery.exceptions import FixupWarning

from beatless import App, Settings
from beatless.worker.celery_app import IGNORED, ConfiguredElsewhere
from beatless.worker.celery_settings import celery_settings

TEXT = (Path(__file__).parents[2] / "docs" / "workers.md").read_text()
TABLE = TEXT.partition("## Celery settings, and why")[2]
NAMED = re.compile(r"`(\w+) = (\w[\w.\"\[\]]*|\[[^]`]*\])`(?: \((Redis|RabbitMQ)\))?")
BROKERS = {"Redis": "redis://127.0.0.1:1/0", "RabbitMQ": "amqp://127.0.0.1:1//"}


@pytest.mark.parametrize("broker", BROKERS)
def test_every_value_that_is_documented_is_set(broker: str) -> None:
    settings = Settings(
        database_url="postgresql://127.0.0.1:1/x",
        redis_url=BROKERS["Redis"],
        broker_url=BROKERS[broker],
    )
    found = celery_settings(settings, [])
    options = found["broker_transport_options"]
    seen = 0
    for cell in re.findall(r"^\| (`.*?) \|", TABLE, re.MULTILINE):
        others = {other for other in BROKERS if other != broker}
        only = set(re.findall(r"\((Redis|RabbitMQ)\)", cell))
        for name, value, where in NAMED.findall(cell):
            # A broker named at the end of a cell is meant for all of it.
            if where in others or (only and not where and only <= others):
                continue
            if name not in found and name not in options:
                assert broker == "RabbitMQ", f"{name} is documented and not set"
                continue  # an option of the Redis transport
            assert (found | options)[name] == ast.literal_eval(value), name
            seen += 1
    assert seen >= 12


def app() -> App:
    return App(Settings(database_url="postgresql://127.0.0.1:1/x", redis_url=BROKERS["Redis"]), [])


def test_the_environment_of_another_celery_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(app().celery.conf)
    for name in IGNORED:
        monkeypatch.setenv(name, "elsewhere")
    found = app().celery
    assert dict(found.conf) == before
    # Celery 5.5 writes no password where there is none.
    urls = {"redis://:**@127.0.0.1:1/0", BROKERS["Redis"]}
    assert {found.connection_for_read().as_uri(), found.connection_for_write().as_uri()} < urls
    assert found.conf.result_backend is None


@pytest.mark.parametrize("call", ["config_from_object", "config_from_envvar"])
def test_nobody_else_configures_the_celery_app(call: str) -> None:
    with pytest.raises(ConfiguredElsewhere, match=f"{call} is for a Celery app of your own"):
        getattr(app().celery, call)("django.conf:settings", namespace="CELERY")


ALWAYS_EAGER = {"task_always_eager": True}
OLD = {"CELERY_ALWAYS_EAGER": True}
EAGER: dict[str, Callable[[Any], Any]] = {
    "update": lambda conf: conf.update(ALWAYS_EAGER),
    "update by name": lambda conf: conf.update(**ALWAYS_EAGER),
    "update by pairs": lambda conf: conf.update(iter(ALWAYS_EAGER.items())),
    "item": lambda conf: operator.setitem(conf, *next(iter(ALWAYS_EAGER.items()))),
    "attribute": lambda conf: setattr(conf, *next(iter(ALWAYS_EAGER.items()))),
    "old name": lambda conf: conf.update(OLD),
}
"""Ways to write what is refused. Nothing is published under it here."""


@pytest.mark.parametrize("way", EAGER)
def test_no_relay_can_be_made_to_execute_runs_itself(way: str) -> None:
    conf = app().celery.conf
    with pytest.raises(
        ConfiguredElsewhere, match=r"(?i)always_eager is for a Celery app of your own"
    ):
        EAGER[way](conf)
    assert not conf.task_always_eager
    conf.update(dict.fromkeys(ALWAYS_EAGER, False), worker_prefetch_multiplier=7)
    assert conf.worker_prefetch_multiplier == 7


def test_an_app_that_is_named_to_celerys_command_says_what_to_name() -> None:
    with pytest.raises(AttributeError, match=r"-A names an App .* -A module:celery"):
        app().user_options  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"^'App' object has no attribute 'user_option'$"):
        app().user_option  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(app(), "user_options")


def test_the_app_of_a_django_project_stays_that_of_all_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Celery's fix-up makes the first app that is made the default one."""
    monkeypatch.setattr(_state, "default_app", None)
    monkeypatch.setattr(_state._tls, "current_app", None)  # other tests have made apps as well
    found = app().celery
    assert _state.default_app is None
    found.set_default()
    assert _state.default_app is found


def test_loggers_that_a_dict_config_has_disabled_speak_again() -> None:
    found = logging.getLogger("beatless.worker")
    level = found.level
    found.disabled = True
    found.setLevel(logging.ERROR)
    try:
        app()
        assert (found.disabled, found.level) == (False, logging.ERROR)
    finally:
        found.setLevel(level)


def test_the_app_of_a_django_project_is_made_with_celerys_fix_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads the loader's name, and sets Django up in a worker."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FixupWarning)  # where Django is not installed
        assert app().celery.loader_cls == "beatless.worker.celery_app:Loader"
