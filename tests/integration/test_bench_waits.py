"""`make bench-waits`, small: every part comes to its end."""

import pytest

from benchmarks.waits.__main__ import PARTS, main

FIGURES = {
    "waiting": ["parked", "idle", "due", "due.early", "signal.ratio", "signals.many"],
    "map": ["map.ratio", "map.resumed"],
    "async": ["async", "async.memory", "async.claims"],
    "loop": ["loop.ratio", "loop.waits.ratio", "loop.waits.replay"],
    "tokens": ["tokens.ratio", "tokens.exact"],
}


@pytest.mark.long(minutes=2)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_measurement_comes_to_its_end(part, capsys) -> None:
    main([part, "--size", "0.01", "--repeats", "1"])

    said = capsys.readouterr().out
    for key in FIGURES[part]:
        assert f"waits.{key} " in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["sleep"], "there is no part 'sleep'; choose of waiting, map, "),
        (["--size", "2"], "--size: above 0, and 1 at most"),
        (["--repeats", "0"], "--repeats: 1 or more"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(arguments, problem, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert problem in capsys.readouterr().err
