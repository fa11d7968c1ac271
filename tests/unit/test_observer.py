"""Signals: values of one type each, all of them emitted, passed on in order."""

import ast
from dataclasses import FrozenInstanceError, fields, is_dataclass
from importlib import import_module

import pytest

from beatless.outbox.observer import (
    FanOut,
    Observer,
    RelayStarted,
    RelayWoke,
    Signal,
    ThreadFailed,
    fan_out,
    ignore,
)
from tests.architecture import modules, tree_of

MODULES = (
    "beatless.outbox.observer",
    "beatless.orchestrator.observer",
    "beatless.streams.observer",
)


def declared(name: str) -> list[type[Signal]]:
    return [
        found
        for found in vars(import_module(name)).values()
        if isinstance(found, type) and issubclass(found, Signal) and found.__module__ == name
    ]


SIGNALS = [kind for name in MODULES for kind in declared(name) if kind is not Signal]


def test_signals_are_declared_in_the_observer_modules_only() -> None:
    assert {kind.__module__ for kind in Signal.__subclasses__()} == set(MODULES)
    assert len({kind.__name__ for kind in SIGNALS}) == len(SIGNALS)


def test_a_signal_is_a_frozen_value_that_says_what_happened() -> None:
    for kind in SIGNALS:
        assert is_dataclass(kind), kind
        assert kind.__doc__, kind
        made = kind(**dict.fromkeys(field.name for field in fields(kind)))
        assert not hasattr(made, "__dict__"), kind


def test_each_signal_is_emitted_somewhere() -> None:
    called = {
        node.func.id
        for module in modules()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert {kind.__name__ for kind in SIGNALS} <= called


def test_equal_signals_are_equal_and_cannot_be_changed() -> None:
    signal = RelayWoke(source="timer")
    assert signal == RelayWoke(source="timer") != RelayWoke(source="notify")
    with pytest.raises(FrozenInstanceError):
        signal.source = "notify"  # type: ignore[misc]


def test_each_signal_is_passed_to_all_observers_in_their_order() -> None:
    seen: list[tuple[str, Signal]] = []

    def named(name: str) -> Observer:
        return lambda signal: seen.append((name, signal))

    observer = fan_out(named("first"), None, ignore, named("second"))
    signals = [RelayStarted(), ThreadFailed(thread="relay", first=True)]
    for signal in signals:
        observer(signal)
    assert seen == [(name, signal) for signal in signals for name in ("first", "second")]


def test_an_observer_of_several_passes_a_signal_on_in_one_call() -> None:
    """Each boundary of a run has one."""
    seen: list[Signal] = []
    assert fan_out(None, seen.append, ignore) == seen.append
    several = fan_out(fan_out(seen.append, seen.remove), ignore, seen.append)
    assert isinstance(several, FanOut)
    assert several.targets == (seen.append, seen.remove, seen.append)


def test_what_an_observer_raises_reaches_the_thread_that_emits() -> None:
    def fails(_signal: Signal) -> None:
        raise ValueError("of the observer")

    with pytest.raises(ValueError, match="of the observer"):
        fan_out(ignore, fails)(RelayStarted())
