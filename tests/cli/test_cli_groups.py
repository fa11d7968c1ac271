"""`beatless groups`, and the group of a run on the command line."""

from beatless.testing import Kit
from tests.commands import Command


def test_the_runs_of_a_queue_age(beatless: Kit, command: Command) -> None:
    run_id = command("start", "two_steps", "--priority", "3").strip()
    command("queues", "set", "default", "--age-after", "90m")
    assert command.error == "in queue default runs that wait for 5400 s come first\n"
    assert "5400 s" in command("queues")
    assert [queue["age_after"] for queue in command.documents("queues", "ls")] == [5400.0]
    assert "after 90.0 minutes it comes before higher priorities" in command("explain", run_id)
    command("queues", "set", "default", "--age-after", "never")
    assert [queue["age_after"] for queue in command.documents("queues")] == [None]
    command("queues", "set", "mial", "--age-after", "5")
    assert "if another was meant, `beatless queues set mial --age-after never`" in command.error
    command("queues", "set", "default", "--age-after", "soon", status=2)
    assert "write it like 30s" in command.error


def test_groups_are_listed_and_get_weights(beatless: Kit, command: Command) -> None:
    run_id = command("start", "two_steps", "--group", "tenant-7").strip()
    command("start", "two_steps", "--group", "tenant-8")

    command("groups", "set", "tenant-7", "--weight", "3")
    assert "tenant-7 has the weight 3" in command.error
    first, second = command.documents("groups", "ls", "--queue", "default")
    assert (first["group"], first["weight"], first["waiting"]) == ("tenant-7", 3, 1)
    assert (second["group"], second["weight"], second["waiting"]) == ("tenant-8", 1, 1)
    assert "tenant-8" in command("groups")
    assert [run["run_id"] for run in command.documents("runs", "--group", "tenant-7")] == [run_id]
    assert "tenant-7" in command("show", run_id)

    command("groups", "set", "tenant-7", "--weight", "0", status=2)
    assert "1<=x<=100" in command.error


def test_groups_are_those_of_a_namespace(beatless: Kit, command: Command) -> None:
    command("start", "two_steps", "--group", "tenant-7", "--namespace", "acme")
    assert "tenant-7" not in command("groups")
    assert "the groups of namespace default" in command.error
    assert "tenant-7" in command("groups", "--namespace", "acme")
    command("groups", "set", "tenant-7", "--weight", "3", "--namespace", "acme")
    assert command.error == "in namespace acme group tenant-7 has the weight 3\n"
    assert command.documents("groups") == []
    [state] = command.documents("groups", "ls", "--namespace", "acme")
    assert state["weight"] == 3
