"""One tenant never learns that another's run exists, whatever it asks for."""

from collections.abc import Iterator
from itertools import product

import pytest

from beatless import App, BadRequest, Client, RunNotFound
from beatless.auth import Scope, Tokens
from beatless.testing import Kit
from tests.serving import Answer, Api, serving


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as api:
        yield api


@pytest.fixture
def tokens(beatless_app: App) -> dict[str, str]:
    """An admin's token of each namespace."""
    made = Tokens(beatless_app.engine, beatless_app.settings.schema)
    return {
        name: made.create([Scope.ADMIN], namespace=name)[1]
        for name in ("default", "acme", "acme-2")
    }


def clients(app: App) -> tuple[Client, Client, Client]:
    return app.client, app.client_for("acme"), app.client_for("acme-2")


def test_everybody_may_use_the_same_ids_and_keys(beatless: Kit) -> None:
    everybody = clients(beatless.app)
    runs = [client.start_run("two_steps", n, run_id="x") for n, client in enumerate(everybody)]
    keyed = [client.start_run("two_steps", n, key="k") for n, client in enumerate(everybody)]

    assert [run.run_id for run in runs] == ["x", "acme~x", "acme-2~x"]
    assert len({run.run_id for run in keyed}) == 3
    for number, client in enumerate(everybody):
        assert client.get_run("x").input == number
        assert client.start_run("two_steps", number, run_id="x") == client.get_run("x")
        assert {run.input for run in client.list_runs()} == {number}
    beatless.work_until_idle()
    assert [client.get_run("x").state for client in everybody] == ["completed"] * 3
    beatless.verify()


def test_the_long_form_of_an_id_is_as_good_as_the_short_one(beatless: Kit) -> None:
    acme = beatless.app.client_for("acme")
    run = acme.start_run("two_steps", run_id="x")
    assert acme.start_run("two_steps", run_id="acme~x") == run
    beatless.work_until_idle()
    for name in ("x", "acme~x"):
        assert acme.get_run(name).run_id == "acme~x"
        assert len(list(acme.stream_run(name))) == len(acme.events(name)) == 6
        assert acme.explain(name)
        assert acme.cancel_run(name).state == "completed"
        assert acme.retry_run(name, "first").retry_of == "acme~x"
    acme.remove_run("x")
    with pytest.raises(RunNotFound):
        acme.get_run("acme~x")


def test_an_id_of_another_namespace_is_told_as_given_with_the_client_that_sees_it(
    beatless: Kit,
) -> None:
    run_id = beatless.app.client_for("acme").start_run("two_steps").run_id
    for client in (beatless.client, beatless.app.client_for("bolt")):
        for call in (client.get_run, client.events, client.cancel_run, client.remove_run):
            with pytest.raises(RunNotFound) as raised:
                call(run_id)
            assert raised.value.run_id == run_id
            assert 'app.client_for("acme")' in raised.value.__notes__[0]
    with pytest.raises(RunNotFound) as raised:
        beatless.client.get_run("nobody")
    assert not hasattr(raised.value, "__notes__")


def test_an_id_of_somebody_else_cannot_be_chosen(beatless: Kit, subtests: pytest.Subtests) -> None:
    for client in clients(beatless.app):
        for run_id in {"acme~x", "acme-2~x", "~x", "x~", "acme~"} - {f"{client._namespace}~x"}:
            with (
                subtests.test(run_id, namespace=client._namespace),
                pytest.raises(BadRequest, match="run_id"),
            ):
                client.start_run("two_steps", run_id=run_id)


def test_odd_names_of_namespaces_are_refused(beatless: Kit, subtests: pytest.Subtests) -> None:
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    for name in ("", "a~b", "A", "a b", "é", "x" * 32, "../x", "a\n"):
        with subtests.test(repr(name)):
            with pytest.raises(BadRequest, match="namespace"):
                beatless.app.client_for(name)
            with pytest.raises(BadRequest, match="namespace"):
                tokens.create([Scope.RUNS_READ], namespace=name)


def ask_everything(api: Api, run_id: str) -> list[Answer]:
    """Everything that takes a run's id, with answers as they would be if ids were all alike."""
    path = f"/v1/runs/{run_id}"
    asked = [
        ("GET", path, None),
        ("GET", f"{path}/events", None),
        ("GET", f"{path}/events?from_seq=99", None),
        ("GET", f"{path}/stream", None),
        ("GET", f"{path}/stream?from_seq=99", None),
        ("GET", f"{path}/stream?from_seq=6", None),
        ("POST", f"{path}/stream-token", None),
        ("POST", f"{path}/cancel", None),
        ("POST", f"{path}/retry", None),
        ("POST", f"{path}/retry", {"from_step": "first"}),
        ("DELETE", path, None),
    ]
    return [api(method, path, body) for method, path, body in asked]


@pytest.mark.slow
def test_whatever_is_asked_for_the_answer_is_that_of_no_run(
    beatless: Kit, api: Api, tokens: dict[str, str]
) -> None:
    made: dict[str, list[str]] = {}
    for owner, token in tokens.items():
        api.token = token
        bodies = [{"plan": "two_steps", "run_id": f"of-{owner}"}, {"plan": "two_steps"}]
        made[owner] = [api("POST", "/v1/runs", body).json["run_id"] for body in bodies]
        if owner == "acme":
            beatless.work_until_idle()  # some have ended, some have not

    for asking, owner in product(tokens, tokens):
        if asking == owner:
            continue
        api.token = tokens[asking]
        nobody = ask_everything(api, "nobody")
        for run_id in (*made[owner], f"of-{owner}"):
            answers = ask_everything(api, run_id)
            assert {answer.status for answer in answers} == {404}
            # The id that was asked for is all that differs.
            assert [a.text.replace(run_id, "nobody") for a in answers] == [a.text for a in nobody]
            assert [a.headers.keys() for a in answers] == [a.headers.keys() for a in nobody]

    for owner, token in tokens.items():
        api.token = token
        listed = {run["run_id"] for run in api("GET", "/v1/runs").json["runs"]}
        assert listed == set(made[owner])
        assert not any(api("GET", f"/v1/runs/{run_id}").status != 200 for run_id in made[owner])
    beatless.verify()


def test_starting_with_the_id_or_key_of_another_is_starting(
    beatless: Kit, api: Api, tokens: dict[str, str]
) -> None:
    for token in tokens.values():
        api.token = token
        for body in ({"run_id": "mine"}, {"key": "order:1"}):
            answer = api("POST", "/v1/runs", {"plan": "two_steps", "input": token} | body)
            assert answer.status == 201
        pages = [
            api("GET", f"/v1/runs?{ask}").json["runs"] for ask in ("limit=9", "plan=two_steps")
        ]
        assert [len(page) for page in pages] == [2, 2]


def test_queues_are_the_whole_fleets_and_no_tenants(
    beatless: Kit, api: Api, tokens: dict[str, str]
) -> None:
    beatless.start_run("two_steps", queue="secret-project")
    for name, status in (("default", 200), ("acme", 403)):
        api.token = tokens[name]
        assert api("GET", "/v1/queues").status == status
        for method, path in (("POST", "pause"), ("POST", "drain"), ("DELETE", "?force=true")):
            if name != "default":
                answer = api(method, f"/v1/queues/secret-project/{path}".replace("/?", "?"))
                assert answer.status == 403
    made = Tokens(beatless.app.engine, beatless.app.settings.schema)
    with pytest.raises(BadRequest, match="whole fleet"):
        made.create([Scope.QUEUES], namespace="acme")


def test_limits_and_groups_are_a_tenants_own(
    beatless: Kit, api: Api, tokens: dict[str, str]
) -> None:
    for client in clients(beatless.app):
        client.start_run("two_steps", group="mine")
    for name, number in (("default", 2), ("acme", 3)):
        api.token = tokens[name]
        assert api("PUT", "/v1/limits/llm?force=true", {"at_once": number}).status == 200
        assert api("PUT", "/v1/groups", {"group": "mine", "weight": number}).status == 200
    for name, number in (("default", 2), ("acme", 3)):
        api.token = tokens[name]
        [limit] = api("GET", "/v1/limits").json["limits"]
        [group] = api("GET", "/v1/groups").json["groups"]
        assert (limit["name"], limit["at_once"]) == ("llm", number)
        assert (group["group"], group["weight"], group["waiting"]) == ("mine", number, 1)
    assert api("DELETE", "/v1/limits/llm").json == {"limit": "llm", "was_set": True}
    api.token = tokens["acme-2"]
    assert api("GET", "/v1/limits").json == {"limits": []}
    assert [state.at_once for state in beatless.client.limits()] == [2]

    made = Tokens(beatless.app.engine, beatless.app.settings.schema)
    for scope, namespace in ((Scope.RUNS_WRITE, "acme"), (Scope.RUNS_WRITE, "default")):
        api.token = made.create([scope], namespace=namespace)[1]
        for path in ("/v1/limits", "/v1/groups"):
            answer = api("GET", path)
            needed = "queues" if namespace == "default" else "admin"
            assert (answer.status, needed in answer.json["detail"]) == (403, True)
    with pytest.raises(BadRequest, match="limits and groups of acme are for its tokens with the"):
        made.create([Scope.QUEUES], namespace="acme")


def test_a_stream_token_of_a_tenant_is_for_its_run_alone(
    beatless: Kit, api: Api, tokens: dict[str, str]
) -> None:
    for name in ("default", "acme"):
        api.token = tokens[name]
        api("POST", "/v1/runs", {"plan": "two_steps", "run_id": "x"})
    beatless.work_until_idle()
    made = api("POST", "/v1/runs/x/stream-token").json["token"]
    api.token = None
    for name in ("x", "acme~x"):
        with api.stream(f"/v1/runs/{name}/stream?token={made}") as stream:
            frames = list(stream)
        assert '"run_id":"acme~x"' in frames[-1]["data"]
    assert api("GET", f"/v1/runs/nobody/stream?token={made}").status == 403
