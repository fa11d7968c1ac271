"""A live self-test of a stack: named checks for known faults, and runs through every hop."""

from beatless.doctor.doctor import Doctor
from beatless.doctor.finding import Finding, Hop, Status

__all__ = ["Doctor", "Finding", "Hop", "Status"]
