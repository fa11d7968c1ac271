"""The bugs that `make planted` plants are still bugs of this tree."""

import pytest

from tests.faults.planted import BUGS, ROOT


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_fits_the_tree(name: str) -> None:
    bug = BUGS[name]
    assert (ROOT / bug.file).read_text().count(bug.text) == 1
    assert bug.text != bug.instead
