"""The files in `deploy` agree with one another and with the code. No tool is needed here."""

import configparser
import json
import re
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import kubernetes_validate
import pytest
import yaml

from beatless import Settings
from beatless.cli import cli
from beatless.observe import families
from beatless.observe.families import Family

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCS = DEPLOY.parent / "docs"
BASE = DEPLOY / "kubernetes" / "base"
PRODUCTION = DEPLOY / "kubernetes" / "overlays" / "production"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SETTINGS = {f"BEATLESS_{entry.name.upper()}" for entry in fields(Settings)}
FAMILIES = {found.name: found for found in vars(families).values() if isinstance(found, Family)}
OURS = ("relay", "worker", "api", "flower", "migrate", "token")
CUSTOM = {"ScaledObject", "TriggerAuthentication"}
"""Of KEDA: no schema of Kubernetes itself tells what they hold."""


def documents(folder: Path) -> list[dict[str, Any]]:
    return [
        document
        for file in sorted(folder.glob("*.yaml"))
        if file.name != "kustomization.yaml"
        for document in yaml.safe_load_all(file.read_text())
    ]


MANIFESTS = [*documents(BASE), *documents(PRODUCTION)]
WORKLOADS = [one for one in MANIFESTS if one["kind"] in ("Deployment", "Job")]


def name_of(document: Mapping[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def container(workload: Mapping[str, Any]) -> dict[str, Any]:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return only


def deployment(name: str) -> dict[str, Any]:
    return next(one for one in WORKLOADS if one["metadata"]["name"] == f"beatless-{name}")


# Kubernetes


@pytest.mark.parametrize(
    "manifest", [one for one in MANIFESTS if one["kind"] not in CUSTOM], ids=name_of
)
def test_manifests_are_what_kubernetes_accepts(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_a_manifest_with_a_mistake_is_refused() -> None:
    broken = json.loads(json.dumps(deployment("relay")))
    container(broken)["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)


@pytest.mark.parametrize("folder", [BASE, PRODUCTION])
def test_every_file_is_part_of_its_kustomization(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    files = {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in listed if not name.startswith("..")} == files


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_no_process_has_more_rights_than_it_needs(workload: dict[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"--uid {pod['securityContext']['runAsUser']} " in (DEPLOY / "Dockerfile").read_text()
    inside = container(workload)["securityContext"]
    assert inside["readOnlyRootFilesystem"]
    assert not inside["allowPrivilegeEscalation"]
    assert inside["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_every_secret_that_is_used_is_made_by_the_readme(workload: dict[str, Any]) -> None:
    readme = (DEPLOY / "README.md").read_text()
    for entry in container(workload)["env"]:
        reference = entry["valueFrom"]["secretKeyRef"]
        assert reference["name"] == "beatless"
        assert f"--from-literal={reference['key']}=" in readme
        assert entry["name"] in SETTINGS | {"FLOWER_BASIC_AUTH"}
    assert "password" not in json.dumps(workload).lower()


def test_every_setting_is_one() -> None:
    for manifest in MANIFESTS:
        if manifest["kind"] == "ConfigMap":
            assert manifest["data"].keys() <= SETTINGS
            Settings.from_env(
                {key: value for key, value in manifest["data"].items() if value},
                database_url="postgresql://a/b",
                redis_url="redis://a",
            )
    overlay = (PRODUCTION / "kustomization.yaml").read_text()
    assert set(re.findall(r"BEATLESS_\w+", overlay)) <= SETTINGS


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_the_command_line_takes_the_arguments(workload: dict[str, Any]) -> None:
    takes(container(workload)["args"])


def takes(arguments: list[str]) -> None:
    """Raises NoSuchOption for one that the command does not have."""
    command = cli
    rest = list(arguments)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None
        command, rest = found, rest[1:]
    command.make_parser(click.Context(command)).parse_args(rest)


def test_arguments_that_are_none_are_found() -> None:
    with pytest.raises(click.NoSuchOption):
        takes(["relay", "--concurrency", "2"])


def test_every_selector_finds_something() -> None:
    pods = [
        {"app.kubernetes.io/part-of": "beatless", **one["spec"]["template"]["metadata"]["labels"]}
        for one in WORKLOADS
    ]
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector is None:
            continue
        labels = selector if manifest["kind"] == "Service" else selector.get("matchLabels", {})
        found = [pod for pod in pods if labels.items() <= pod.items()]
        for rule in selector.get("matchExpressions", []):
            found = [pod for pod in found if pod.get(rule["key"]) in rule["values"]]
            assert set(rule["values"]) <= {pod.get(rule["key"]) for pod in pods}
        assert found, name_of(manifest)


def test_every_probe_and_service_names_a_port_that_is_there() -> None:
    named = {}
    for workload in WORKLOADS:
        inside = container(workload)
        ports = {port["name"] for port in inside.get("ports", [])}
        named[workload["metadata"]["name"]] = ports
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "httpGet" in inside.get(probe, {}):
                assert inside[probe]["httpGet"]["port"] in ports
    for manifest in MANIFESTS:
        if manifest["kind"] == "Service":
            target = manifest["spec"]["selector"]["app.kubernetes.io/name"]
            assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= named[target]


def test_the_network_lets_through_what_listens() -> None:
    listening = {
        port["containerPort"] for one in WORKLOADS for port in container(one).get("ports", [])
    }
    opened = {
        port["port"]
        for manifest in MANIFESTS
        if manifest["kind"] == "NetworkPolicy"
        for rule in manifest["spec"].get("ingress", [])
        for port in rule["ports"]
    }
    assert opened == listening


def test_no_rollout_takes_the_last_one() -> None:
    for name in ("relay", "worker", "api"):
        spec = deployment(name)["spec"]
        rolling = spec["strategy"]["rollingUpdate"]
        assert spec["replicas"] > 1
        assert rolling["maxUnavailable"] in (0, 1)
        assert any(
            one["kind"] == "PodDisruptionBudget" and one["metadata"]["name"] == f"beatless-{name}"
            for one in MANIFESTS
        )
    # The worker is given longer than a step may take: the others have none in flight.
    grace = {
        name: deployment(name)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for name in ("relay", "worker", "api")
    }
    assert grace["worker"] > grace["api"] > 5 + 5  # the pause before the end, and uvicorn's own
    assert grace["relay"] >= 10


def test_what_scales_by_itself_has_no_fixed_number() -> None:
    overlay = yaml.safe_load((PRODUCTION / "kustomization.yaml").read_text())
    freed = {
        patch["target"]["name"]
        for patch in overlay["patches"]
        if "/spec/replicas" in patch["patch"]
    }
    scaled = {
        one["spec"]["scaleTargetRef"]["name"]
        for one in MANIFESTS
        if one["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")
    }
    assert freed == scaled
    (autoscale,) = [one for one in MANIFESTS if one["kind"] == "ScaledObject"]
    (trigger,) = autoscale["spec"]["triggers"]
    arguments = container(deployment("worker"))["args"]
    target = trigger["metadata"]["targetQueryValue"]
    assert target == arguments[arguments.index("--concurrency") + 1]
    (authentication,) = [one for one in MANIFESTS if one["kind"] == "TriggerAuthentication"]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]


# Compose


def test_the_compose_file_asks_its_services_whether_they_work() -> None:
    for name, service in COMPOSE["services"].items():
        if name in ("migrate", "token"):
            continue
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert service["restart"] == "unless-stopped", name


@pytest.mark.parametrize("name", OURS)
def test_compose_services_of_ours_are_confined_and_take_their_arguments(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["image"] == "beatless:local"
    assert {key for key in service["environment"] if key.startswith("BEATLESS")} <= SETTINGS
    takes(service["command"])


def test_every_variable_of_the_compose_file_is_in_the_example() -> None:
    example = (DEPLOY / "example.env").read_text()
    used = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert {name for name in used if f"{name}=" not in example} == {"PIP_INDEX_URL"}


def test_nothing_but_loopback_is_opened_to_the_host() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_the_workers_of_the_compose_file_outlive_its_longest_wait() -> None:
    services = COMPOSE["services"]
    seconds = {
        name: int(service["stop_grace_period"].removesuffix("s"))
        for name, service in services.items()
        if "stop_grace_period" in service
    }
    assert seconds["worker"] == max(seconds.values())
    assert {"worker", "relay", "api", "postgres"} <= seconds.keys()


def test_prometheus_finds_the_services_of_the_compose_file() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        name = job["job_name"].removeprefix("beatless-")
        service = COMPOSE["services"][name]
        if name == "api":
            assert job["static_configs"][0]["targets"] == [f"api:{service['command'][-1]}"]
        else:
            (found,) = job["dns_sd_configs"]
            assert found["names"] == [name]
            assert str(found["port"]) == service["environment"]["BEATLESS_METRICS_PORT"]
    (rules,) = config["rule_files"]
    assert (DEPLOY / "prometheus" / rules).exists()


# systemd


@pytest.mark.parametrize(
    "file", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda f: f.stem
)
def test_units_are_confined_watched_and_take_their_arguments(file: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(file.read_text())
    service = unit["Service"]
    command = service["ExecStart"].split()
    takes(command[1:])
    if service["Type"] != "oneshot":
        assert service["Restart"] == "always"
        if command[1] == "flower":  # it does not know systemd
            assert service["Type"] == "exec"
            assert "WatchdogSec" not in service
        else:
            assert service["Type"] == "notify"
            # An idle relay moves every 15 s.
            assert int(service["WatchdogSec"]) >= 45
    for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces"):
        assert service[name] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""


def test_prometheus_finds_the_ports_of_the_units() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus-systemd.yml").read_text())
    for job in config["scrape_configs"]:
        (target,) = job["static_configs"][0]["targets"]
        unit = (DEPLOY / "systemd" / f"{job['job_name']}.service").read_text()
        assert re.search(rf"-port {target.removeprefix('127.0.0.1:')}$", unit, re.MULTILINE)
    compose = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    names = [[job["job_name"] for job in each["scrape_configs"]] for each in (config, compose)]
    assert names[0] == names[1]
    assert config["rule_files"] == compose["rule_files"]


def test_each_role_has_a_unit_and_a_manifest() -> None:
    roles = {"api", "flower", "migrate", "relay", "worker"}
    units = {file.stem.removeprefix("beatless-") for file in (DEPLOY / "systemd").iterdir()}
    manifests = {file.stem for file in (DEPLOY / "kubernetes" / "base").iterdir()}
    assert units == roles
    assert roles <= manifests


def test_flower_has_a_redis_user_of_its_own_in_a_unit_and_in_a_manifest() -> None:
    """With that of the relay it hears nothing: each user has the rights of its role only."""
    assert "user flower on" in (DEPLOY / "redis" / "users.acl").read_text()
    unit = (DEPLOY / "systemd" / "beatless-flower.service").read_text()
    assert "EnvironmentFile=/etc/beatless/flower" in unit
    container = yaml.safe_load_all((DEPLOY / "kubernetes" / "base" / "flower.yaml").read_text())
    (found,) = next(container)["spec"]["template"]["spec"]["containers"]
    keys = {
        each["name"]: each["valueFrom"]["secretKeyRef"]["key"]
        for each in found["env"]
        if "valueFrom" in each
    }
    assert keys["BEATLESS_REDIS_URL"] == "flower-redis-url"


def test_a_workload_that_may_be_behind_a_pooler_is_told_the_direct_connection() -> None:
    """Else it takes the pooler for Postgres, and sends it session settings and prepared names."""
    for workload in WORKLOADS:
        keys = {
            variable["name"]: variable["valueFrom"]["secretKeyRef"]["key"]
            for variable in container(workload)["env"]
            if "valueFrom" in variable
        }
        if keys["BEATLESS_DATABASE_URL"] == "database-url":
            assert keys["BEATLESS_LISTEN_URL"] == "listen-url"


def test_each_workload_has_the_redis_user_of_its_role_from_a_secret_that_the_readme_makes() -> None:
    readme = (DEPLOY / "README.md").read_text()
    made = dict(re.findall(r"--from-literal=(\S+?)=(\S+)", readme))
    users = {}
    for workload in WORKLOADS:
        for variable in container(workload)["env"]:
            if "valueFrom" in variable:
                key = variable["valueFrom"]["secretKeyRef"]["key"]
                assert key in made
                if variable["name"] == "BEATLESS_REDIS_URL":
                    users[workload["metadata"]["name"]] = urlsplit(made[key]).username
    acl = (DEPLOY / "redis" / "users.acl").read_text()
    assert all(f"user {user} on" in acl for user in users.values())
    assert users["beatless-api"] == "viewer"
    assert users["beatless-relay"] == "relay"
    # Its canary follows a run, which the user of the relay may not.
    (asked,) = re.findall(r"exec deploy/(\S+) -- beatless doctor", readme)
    assert users[asked] == "viewer"


# Metrics


def expressions() -> Iterator[tuple[str, str]]:
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for group in alerts["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")


EXPRESSIONS = list(expressions())


def problems(expression: str) -> list[str]:
    """What is wrong with an expression: names, labels, brackets."""
    found = []
    text = re.sub(r'"[^"]*"', '""', expression)
    for opening, closing in ("()", "[]", "{}"):
        if text.count(opening) != text.count(closing):
            found.append(f"{opening}{closing} do not match")
    known: set[str] = {"le", "version"}
    for name in re.findall(r"beatless_\w+", text):
        family = FAMILIES.get(name) or FAMILIES.get(re.sub(r"_(bucket|count|sum)$", "", name))
        if name == "beatless_build_info":
            continue
        if family is None or (family.name != name) != (family.buckets_s is not None):
            found.append(f"{name} is no metric")
            continue
        known |= set(family.labels)
        counter = name.endswith(("_total", "_bucket", "_count", "_sum"))
        rated = re.search(rf"(rate|increase)\({name}(\{{[^}}]*\}})?\[", text)
        if counter != bool(rated):
            found.append(f"{name} is read as what it is not")
        for labels in re.findall(rf"{name}\{{([^}}]*)\}}", text):
            found += [
                f"{name} has no label {label}"
                for label in re.findall(r"(\w+)[=!]", labels)
                if label not in family.labels
            ]
    for labels in re.findall(r"by \(([^)]*)\)", text):
        found += [
            f"nothing here has a label {label}"
            for label in re.split(r",\s*", labels)
            if label not in known
        ]
    return found


def test_alerts_and_panels_read_metrics_that_exist() -> None:
    found = {text: problems(text) for _, text in EXPRESSIONS}
    assert {text: what for text, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "wrong",
    [
        "max(beatless_outbox_age)",
        "sum(rate(beatless_runs_started_total[5m])",
        "sum by (queues) (max by (queue, state) (beatless_runs_active))",
        'beatless_runs_active{stat="queued"}',
        "sum(beatless_runs_started_total)",
        "rate(beatless_outbox_pending[5m])",
        "rate(beatless_run_duration_seconds[5m])",
        "rate(beatless_lease_lost_total_bucket[5m])",
    ],
)
def test_the_check_of_expressions_finds_mistakes(wrong: str) -> None:
    assert problems(wrong)


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(text for name, text in EXPRESSIONS)
    assert [name for name in FAMILIES if name not in shown] == []


def test_panels_have_room_and_a_source() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "prometheus"
            assert panel["targets"]
    source = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    assert source["datasources"][0]["uid"] == "prometheus"


def test_every_alert_has_a_section_in_the_runbook() -> None:
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    sections = {
        re.sub(r"[^a-z0-9 -]", "", line.removeprefix("## ").lower()).replace(" ", "-")
        for line in (DOCS / "operations.md").read_text().splitlines()
        if line.startswith("## ")
    }
    for group in alerts["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook"] in sections, rule["alert"]
            assert rule["labels"]["severity"] in ("page", "ticket")


# Redis


def test_the_users_are_those_of_the_settings_page() -> None:
    documented = {
        line.split()[2]: line.split()[5:]
        for line in (DOCS / "settings.md").read_text().splitlines()
        if line.startswith("ACL SETUSER ")
    }
    in_file = {
        line.split()[1]: line.split()[4:]
        for line in (DEPLOY / "redis" / "users.acl").read_text().splitlines()
    }
    assert in_file.pop("default") == []
    assert in_file.pop("admin") == ["~*", "&*", "+@all"]  # for persons: passwords, INFO
    assert in_file == documented


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_no_pod_is_told_of_services_by_variables(workload: dict[str, Any]) -> None:
    assert workload["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_health_check_takes_no_service_for_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = runpy.run_path(str(DEPLOY / "healthy.py"))
    monkeypatch.setenv("API_PORT", "tcp://10.96.12.7:8400")
    assert healthy["port"]("API_PORT", "8400") == "8400"
    monkeypatch.setenv("API_PORT", "80")
    assert healthy["port"]("API_PORT", "8400") == "80"
