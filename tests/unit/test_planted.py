"""The bugs that `make planted` plants are still bugs of this tree."""

from tests.faults.bugs import BUGS
from tests.faults.results import ROOT


def test_a_bug_fits_the_tree() -> None:
    for name, bug in BUGS.items():
        for edit in bug.edits:
            assert (ROOT / edit.file).read_text().count(edit.text) == 1, name
            assert edit.text != edit.instead, name
