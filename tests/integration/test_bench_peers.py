"""`make bench-peers`, small, with nothing but beatless: every workload comes to its end."""

import pytest

from benchmarks.peers.__main__ import main
from benchmarks.peers.catalogue import WORKLOADS


@pytest.mark.long
@pytest.mark.parametrize("workload", WORKLOADS)
def test_our_own_part_of_the_measurement_comes_to_its_end(workload, capsys) -> None:
    status = main(["--quick", "--only", "beatless", "--workload", workload])
    said = capsys.readouterr().out
    assert status == 0, said
    assert f"1/1 {workload}" in said
    assert "left out" not in said


def test_a_peer_that_there_is_not_is_told_with_those_that_there_are(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--only", "beatless,sidekiq"])
    assert error.value.code == 2
    assert "there is no 'sidekiq'; choose of beatless, " in capsys.readouterr().err
