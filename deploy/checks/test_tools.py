"""What the tools themselves say about the files: promtool, kubectl, systemd-analyze, nginx, Caddy.

Run by `make check-deploy`, which chooses by the names of the tests and says which tool is missing.
"""

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fastapi.testclient import TestClient

from beatless.api import create_api
from beatless.testing import Kit
from tests.integration.test_metrics import APP, metrics_url

DEPLOY = Path(__file__).parents[1]
CERTIFICATES = DEPLOY.parent / "tests" / "certificates"
CUSTOM = {"ScaledObject", "TriggerAuthentication"}


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)


def passes(*command: str, **options: Any) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_takes_the_files_and_the_alerts_come_when_they_should() -> None:
    folder = DEPLOY / "prometheus"
    for name in ("prometheus.yml", "prometheus-systemd.yml"):
        passes("promtool", "check", "config", name, cwd=folder)
    passes("promtool", "test", "rules", "alerts.test.yml", cwd=folder)


def dashboard_rules(directory: Path, *more: str) -> Path:
    """The expressions of all panels, as rules: promtool reads no dashboards."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    expressions = [
        target["expr"].replace("$__rate_interval", "5m")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    rules = [
        {"record": f"panel:{number}", "expr": text}
        for number, text in enumerate([*expressions, *more])
    ]
    file = directory / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    return file


def test_promtool_understands_what_every_panel_asks(tmp_path: Path) -> None:
    passes("promtool", "check", "rules", str(dashboard_rules(tmp_path)))


def test_promtool_has_nothing_to_say_of_any_metric(beatless: Kit) -> None:
    relay = beatless.relay_process(APP, metrics_port=0)
    worker = beatless.worker_process(APP, concurrency=2, metrics_port=0)
    for plan in ("two_steps", "fatally", "asks"):
        beatless.start_run(plan)
    beatless.wait_for_run_completion(beatless.start_run("two_steps").run_id)
    pages = [urllib.request.urlopen(metrics_url(each.log), timeout=60) for each in (relay, worker)]
    texts = [page.read().decode() for page in pages]
    with TestClient(create_api(beatless.app, is_open=True)) as api:
        texts.append(api.get("/metrics").text)
    for text in texts:
        assert text.count("# TYPE beatless_") > 5
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    wrong = dashboard_rules(tmp_path, "sum(rate(beatless_runs_started_total[5m]) by (plan)")
    assert run("promtool", "check", "rules", str(wrong)).returncode != 0


@pytest.mark.parametrize("folder", ["base", "overlays/production"])
def test_kubectl_builds_what_kubernetes_accepts(folder: str) -> None:
    built = passes("kubectl", "kustomize", str(DEPLOY / "kubernetes" / folder))
    documents = list(yaml.safe_load_all(built))
    assert len(documents) > 10
    for document in documents:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, "1.31", strict=True)
        if document["kind"] in ("Deployment", "Job"):
            pod = document["spec"]["template"]
            assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "beatless"
            if folder != "base":
                (inside,) = pod["spec"]["containers"]
                assert inside["image"] == "registry.example/beatless:0.1.0"
        if document["kind"] == "Deployment" and folder != "base":
            scaled = document["metadata"]["name"] in ("beatless-worker", "beatless-api")
            assert ("replicas" in document["spec"]) != scaled


@pytest.mark.parametrize(
    "unit", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda unit: unit.stem
)
def test_systemd_takes_the_units_and_finds_them_confined(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    # verify wants the command to be there
    text = unit.read_text().replace("/srv/beatless/venv/bin/beatless", "/bin/true")
    copy.write_text(text)
    assert passes("systemd-analyze", "verify", str(copy)) == ""
    # In tenths: 0 is perfect, 100 is not confined at all.
    passes("systemd-analyze", "security", "--offline=true", "--threshold=20", str(copy))


def test_systemd_finds_a_mistake(tmp_path: Path) -> None:
    copy = tmp_path / "wrong.service"
    copy.write_text("[Service]\nExecStart=/bin/true\nWatchdogSeconds=60\n")
    assert "WatchdogSeconds" in passes("systemd-analyze", "verify", str(copy))


def test_nginx_takes_its_file(tmp_path: Path) -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    for suffix, name in (("pem", "server.pem"), ("key", "server.key")):
        text = text.replace(f"/etc/ssl/beatless.{suffix}", str(CERTIFICATES / name))
    (tmp_path / "site.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; include {tmp_path}/site.conf; }}"
    )
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    passes(nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"))


def test_caddy_takes_its_file() -> None:
    file = str(DEPLOY / "Caddyfile")
    passes("caddy", "validate", "--adapter", "caddyfile", "--config", file)
    assert run("caddy", "fmt", file).stdout == (DEPLOY / "Caddyfile").read_text()


@pytest.mark.parametrize("profile", [[], ["--profile", "monitoring"]])
def test_compose_takes_its_file(profile: list[str]) -> None:
    legacy = shutil.which("docker-compose")
    command = [legacy] if legacy else ["docker", "compose"]
    env = ["--env-file", str(DEPLOY / "example.env")]
    file = str(DEPLOY / "compose.yaml")
    shown = passes(*command, *env, "-f", file, *profile, "config")
    services = yaml.safe_load(shown[shown.index("services:") :])["services"]
    assert services["worker"]["command"] == ["worker", "--concurrency", "2"]
