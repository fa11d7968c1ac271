"""`beatless start` and `runs` with dedupe keys."""

from beatless.testing import Kit
from tests.commands import Command

KEYED = ("start", "two_steps", "--dedupe-key", "customer:7")


def test_a_start_that_stores_no_run_says_so(beatless: Kit, command: Command) -> None:
    first = command(*KEYED).strip()
    assert command.error == ""
    assert command(*KEYED).strip() == first
    assert f"no run was started: this joins run {first}, which is queued" in command.error
    assert command(*KEYED, "--while-unfinished", "skip", "--follow").strip() == first
    assert f"with its dedupe key is unfinished run {first}" in command.error
    [told] = command.documents(*KEYED, "--debounce", "5s", "--max-wait", "1m", "--input", "2")
    assert (told["run_id"], told["start"], told["input"]) == (first, "input_replaced", 2)
    assert f"the input replaces that of run {first}" in command.error
    newer = command(*KEYED, "--while-unfinished", "replace").strip()
    assert (newer == first, command.error) == (False, "")
    assert command("runs", "--dedupe-key", "other") == command("runs", "--plan", "nothing")
    found = command.documents("runs", "--dedupe-key", "customer:7")
    assert [run["run_id"] for run in found] == [newer, first]
    beatless.work_until_idle()
    assert beatless.client.get_run(newer).state == "completed"


def test_options_that_do_not_go_together_are_told(command: Command) -> None:
    command("start", "two_steps", "--debounce", "5s", status=2)
    assert "debounce needs a dedupe_key" in command.error
    command(*KEYED, "--while-unfinished", "drop", status=2)
    assert "choose join, skip, replace" in command.error
