"""Errors cross process borders, and every one is in the tree of its package."""

import inspect
import pickle
from collections.abc import Iterator

import pytest

import beatless.errors
import beatless.local.errors
import beatless.orchestrator.body
import beatless.orchestrator.errors
import beatless.orchestrator.execution
import beatless.orchestrator.executor
import beatless.orchestrator.plan
import beatless.orchestrator.progress
import beatless.outbox.errors
import beatless.outbox.faults

MODULES = [
    beatless.errors,
    beatless.local.errors,
    beatless.orchestrator.errors,
    beatless.orchestrator.body,
    beatless.orchestrator.execution,
    beatless.orchestrator.executor,
    beatless.orchestrator.plan,
    beatless.orchestrator.progress,
    beatless.outbox.errors,
    beatless.outbox.faults,
]


def errors_of(module) -> Iterator[type[BaseException]]:
    for found in vars(module).values():
        if (
            inspect.isclass(found)
            and issubclass(found, BaseException)
            and found.__module__ == module.__name__
        ):
            yield found


ERRORS = [error for module in MODULES for error in errors_of(module)]


def example(error: type[BaseException]) -> BaseException:
    """An instance with a plausible argument for each parameter."""
    if "__init__" not in vars(error):
        return error("what happened")
    samples = {"float": 1.5, "int": 7, "Exception": ValueError("inner"), "Sequence": ["b", "a"]}
    arguments = []
    for name, parameter in list(inspect.signature(error.__init__).parameters.items())[1:]:
        kind = str(getattr(parameter.annotation, "__name__", parameter.annotation))
        arguments.append(samples.get(kind.partition("[")[0], f"the {name}"))
    return error(*arguments)


def test_an_error_survives_pickling_with_its_text_and_members():
    for error in ERRORS:
        before = example(error)

        after = pickle.loads(pickle.dumps(before))

        assert type(after) is error
        assert str(after) == str(before)
        assert vars(after).keys() == vars(before).keys(), error
        assert str(before).strip(), error
        assert "\n" not in str(before)


@pytest.mark.parametrize(
    "module",
    [beatless.errors, beatless.orchestrator.errors, beatless.outbox.errors],
    ids=lambda m: m.__name__,
)
def test_the_tree_in_the_docstring_is_the_tree(module):
    base, *leaves = errors_of(module)
    drawn = [
        line.split()[1] for line in module.__doc__.splitlines() if line.startswith(("├──", "└──"))
    ]
    assert base.__name__ in module.__doc__.splitlines()
    assert sorted(drawn) == sorted(leaf.__name__ for leaf in leaves)
    assert all(issubclass(leaf, base) for leaf in leaves)


def test_every_error_says_what_it_means():
    assert [error for error in ERRORS if not error.__doc__] == []
