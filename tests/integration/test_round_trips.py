"""JSON of users comes back as it was given: nulls, what is empty, large numbers, any text."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from beatless import App, Fatal, Plan, StepContext, step
from beatless.cli import run as run_command
from beatless.http import Client
from beatless.testing import Kit
from tests.serving import serving

AWKWARD = {
    "email": None,
    "list": [{"x": None}, None, [], {}, [None]],
    "": {"": None},
    "big": [2**53 + 1, -(2**63) - 1, 10**40, 1e23, 1.5e300, 5e-324, 0.1],
    "text": "\u2028 \u2029 \u0085 \\u0000 → 漢字 \U0001f600",
    "bools": [True, False, 1, 0],
    "reused": None,
    "next": None,
}


MODULE = """
from beatless import App, Plan, Settings, step

steps = [step(name=name)(lambda ctx: None) for name in ("lookup", "nothing", "use")]
app = App(Settings.from_env(), plans=[Plan("p", steps)])
"""


@step
def lookup(ctx: StepContext) -> Any:
    return ctx.input


@step
def nothing(ctx: StepContext) -> None:
    return None


@step
def use(ctx: StepContext) -> Any:
    seen.append((ctx.input, ctx.results["lookup"], ctx.results["nothing"]))
    raise Fatal("the service is away")


seen: list[tuple[Any, Any, Any]] = []


@pytest.fixture
def beatless_plans() -> list[Plan]:
    seen.clear()
    return [Plan("p", [lookup, nothing, use], default_input={"a": "default"})]


def same(value: Any, other: Any) -> bool:
    """As JSON, where a number is a number however it is written, and true is none."""
    return json.dumps(as_text(value)) == json.dumps(as_text(other))


def as_text(value: Any) -> Any:
    match value:
        case dict():
            return {key: as_text(value[key]) for key in sorted(value)}
        case list():
            return [as_text(item) for item in value]
        case bool() | None | str():
            return value
        case _:
            return ["number", float(value)] if abs(value) >= 2**53 else ["number", value + 0]


def use_everywhere(kit: Kit, value: Any) -> None:
    """Start with it, retry in every way, and look at what the last step was given."""
    run = kit.start_run("p", value)
    kit.work_until_idle()
    client = kit.client
    client.retry_run(run.run_id)
    client.retry_run(run.run_id, "nothing")
    client.retry_run(run.run_id, "use")
    client.retry_run(run.run_id, "lookup")
    kit.work_until_idle()
    again, refused = client.retry_failed()
    assert refused == []
    assert again
    kit.work_until_idle()


def arbitrary(draw: Random, depth: int = 3) -> Any:
    """Some JSON."""
    text = "".join(draw.choices('a\x7f\u2028\u00e9\U0001f600"\\{}', k=draw.randrange(4)))
    kinds = [
        None,
        draw.random() < 0.5,
        draw.randint(-(2**70), 2**70),
        draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300),
        text,
        {},
        [],
    ]
    if depth and draw.random() < 0.6:
        items = [arbitrary(draw, depth - 1) for _ in range(draw.randrange(4))]
        return items if draw.random() < 0.5 else {f"{text}{n}": i for n, i in enumerate(items)}
    return draw.choice(kinds)


@pytest.mark.slow
def test_whatever_is_json_survives_every_kind_of_retry(beatless: Kit) -> None:
    given = [AWKWARD, *(arbitrary(Random(seed)) for seed in range(300))]
    use_everywhere(beatless, given)
    assert len(seen) == 9  # the first, four retries, and one retry of each of these
    for input, result, nothing in seen:
        assert same(input, given)
        assert same(result, given)
        assert nothing is None


def test_a_null_input_is_not_the_default_of_a_later_version(
    beatless: Kit, beatless_app: App
) -> None:
    before = App(beatless_app.settings, [Plan("p", [lookup, nothing, use])])
    run_id = before.client.start_run("p").run_id
    before.close()
    beatless.work_until_idle()
    beatless.client.retry_run(run_id, "lookup")
    beatless.work_until_idle()
    assert seen == [(None, None, None)] * 2


def test_over_http_and_from_the_command_line_too(
    beatless: Kit,
    beatless_app: App,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "of_the_command.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def command(*arguments: str) -> str:
        assert run_command(["--app", "of_the_command:app", *arguments]) == 0
        return capsys.readouterr().out

    with serving(beatless_app) as api, Client(f"http://127.0.0.1:{api.port}") as client:
        run = client.start_run("p", AWKWARD)
        assert same(run.input, AWKWARD)
        beatless.work_until_idle()
        client.retry_run(run.run_id)
        assert same(client.get_run(run.run_id).input, AWKWARD)
        finished = [event for event in client.events(run.run_id) if event.type == "StepFinished"]
        assert [same(event.data, {"result": AWKWARD}) for event in finished] == [True, False]
        assert finished[1].data == {"result": None}
    command("retry", run.run_id)
    started = command("start", "p", "--input", json.dumps(AWKWARD)).strip()
    beatless.work_until_idle()
    command("dead-letters", "requeue", started)
    beatless.work_until_idle()
    assert len(seen) == 5
    for input, result, nothing in seen:
        assert same(input, AWKWARD)
        assert same(result, AWKWARD)
        assert nothing is None
