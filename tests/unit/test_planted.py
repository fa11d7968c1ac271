"""The bugs that `make planted` plants are still bugs of this tree."""

import pytest

from tests.faults.bugs import BUGS
from tests.faults.results import ROOT


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_fits_the_tree(name: str) -> None:
    for edit in BUGS[name].edits:
        assert (ROOT / edit.file).read_text().count(edit.text) == 1
        assert edit.text != edit.instead
