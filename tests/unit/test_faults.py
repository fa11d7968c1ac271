"""Crash points: named, counted, and free when unused."""

import pytest

from beatless.outbox.faults import POINTS, CrashPoints, SimulatedCrash


def test_a_point_crashes_at_its_nth_pass_and_only_then():
    points = CrashPoints("step.before@3:raise")
    points.reach("step.before")
    points.reach("step.committed")
    points.reach("step.before")
    with pytest.raises(SimulatedCrash, match=r"at step\.before$"):
        points.reach("step.before")
    points.reach("step.before")


def test_passes_are_counted_from_the_arming():
    points = CrashPoints("step.before:raise")
    with pytest.raises(SimulatedCrash):
        points.reach("step.before")
    points.arm("step.before", nth=2)
    points.reach("step.before")
    with pytest.raises(SimulatedCrash):
        points.reach("step.before")


def test_a_simulated_crash_passes_every_handler_that_a_real_one_would_skip():
    assert not issubclass(SimulatedCrash, Exception)


def test_unarmed_points_do_nothing():
    for point in POINTS:
        CrashPoints().reach(point)
