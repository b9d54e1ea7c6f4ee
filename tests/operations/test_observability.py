"""Prometheus configuration, alerts and dashboard: all metrics that they name exist, every alert fires when it must, and
a real Prometheus reads real services.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import yaml

from api.http.metrics import ApiMetrics
from benchmarks.ports import free_port
from memory_service.http.metrics import Metrics as MemoryMetrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "ramrec.json"
TRIALS = sorted((ROOT / "tests" / "alerts").glob("*.yml"))
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
PROMETHEUS_OWN = {"up", "ALERTS"}
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "offset", "bool", "group_left", "group_right"}


def tool(name: str) -> str:
    """The path of a program that `make tools` has fetched or that is installed."""
    ours = ROOT / "build" / "tools" / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: `make tools` fetches it")
    return found


def exposed() -> set[str]:
    """Names of all samples that the services expose."""
    families = [one for metrics in (ApiMetrics(), MemoryMetrics()) for one in metrics.registry.collect()]
    return {one.name + suffix for one in families for suffix in SUFFIXES[one.type]}


def named(expression: str) -> set[str]:
    """Names of the series in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\boffset\s+\w+", "", bare)
    return set(re.findall(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)) - WORDS


def alerts() -> list[dict]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict]:
    return [one for one in json.loads(DASHBOARD.read_text())["panels"] if one["type"] != "row"]


def expressions() -> list[str]:
    asked = [rule["expr"] for rule in alerts()]
    asked += [target["expr"] for panel in panels() for target in panel["targets"]]
    board = json.loads(DASHBOARD.read_text())
    queries = [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    return asked + [query.removeprefix("label_values(").split(",")[0] for query in queries]


def test_names_are_found_in_expressions():
    assert named('sum by (le, b) (rate(a_bucket{x="y z"}[5m] offset 1w)) / on (b) c > 0.5 and absent(d == 1)') == {
        "a_bucket",
        "c",
        "d",
    }


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_in_an_expression_exists(expression):
    asked = named(expression)
    assert asked
    assert asked <= exposed() | PROMETHEUS_OWN


def test_the_dashboard_shows_every_metric_of_the_services():
    shown = {name for panel in panels() for target in panel["targets"] for name in named(target["expr"])}
    rates = {
        "ramrec_api_click_through",
        "ramrec_api_hit_rate",
    }  # of one process; the dashboard computes them over all
    for metrics in (ApiMetrics(), MemoryMetrics()):
        for one in metrics.registry.collect():
            if one.name.startswith("ramrec_") and one.name not in rates:
                assert {one.name + suffix for suffix in SUFFIXES[one.type]} & shown, one.name


def test_panels_of_the_dashboard_do_not_overlap():
    places = json.loads(DASHBOARD.read_text())["panels"]
    assert len({one["id"] for one in places}) == len(places)
    taken = [
        (x, y)
        for at in (one["gridPos"] for one in places)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_every_alert_says_what_is_wrong_how_bad_and_what_to_do():
    assert len({rule["alert"] for rule in alerts()}) == len(alerts())
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_alert_has_a_test_that_it_fires_and_one_that_it_does_not():
    tried = {test["name"] for file in TRIALS for test in yaml.safe_load(file.read_text())["tests"]}
    assert tried == {f"{rule['alert']} {kind}" for rule in alerts() for kind in ("fires", "stays quiet")}


# ------------------------------------------------------------------------------------- a real Prometheus


def run_tool(*words: object) -> str:
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_configuration_and_rules():
    assert "SUCCESS" in run_tool(tool("promtool"), "check", "config", PROMETHEUS / "prometheus.yml")
    assert f"{len(alerts())} rules found" in run_tool(tool("promtool"), "check", "rules", PROMETHEUS / "alerts.yml")


def test_alerts_fire_when_they_must_and_at_no_other_time():
    run_tool(tool("promtool"), "test", "rules", *TRIALS)


@pytest.fixture
def prometheus(api_url, memory_url, tmp_path) -> Iterator[httpx2.Client]:
    """A Prometheus with the repository's configuration, which scrapes the services of this test each second."""
    program = tool("prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    where = {"ramrec-api": api_url, "ramrec-memory": memory_url}
    config["scrape_configs"] = [one for one in config["scrape_configs"] if one["job_name"] in where]
    for one in config["scrape_configs"]:
        del one["dns_sd_configs"]
        one["static_configs"] = [{"targets": [where[one["job_name"]].removeprefix("http://")]}]
    for name in ("alerts.yml", "api.key", "memory.token"):
        shutil.copy(PROMETHEUS / name, tmp_path)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    words = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([program, *words, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def asked(client: httpx2.Client, expression: str) -> list[dict]:
    try:
        answer = client.get("/api/v1/query", params={"query": expression})
    except httpx2.ConnectError:
        return []  # it is still starting
    return answer.json()["data"]["result"] if answer.status_code == 200 else []


def test_a_real_prometheus_reads_both_services_and_understands_every_expression(prometheus, api_url):
    with httpx2.Client(base_url=api_url, timeout=30) as api:
        taken = [{"user_id": "u", "item_id": f"i{n}"} for n in range(1, 15)]
        assert api.post("/memories", json={"interactions": taken}).json()["accepted"] == 14
        given = api.post("/recommend", json={"user_id": "u"}).json()["recommendation_id"]
        more = {"user_id": "u", "item_id": "i20", "recommendation_id": given}
        assert api.post("/memories", json={"interactions": [more]}).json()["accepted"] == 1
    enough = 'ramrec_memory_entries_pruned_total > 0 and on () ramrec_api_feedback_total{outcome="other"} >= 0'
    while not asked(prometheus, enough):
        pass
    values = asked(prometheus, "up")
    assert {(one["metric"]["job"], one["value"][1]) for one in values} == {("ramrec-api", "1"), ("ramrec-memory", "1")}
    for expression in expressions():
        filled = expression.replace("$__rate_interval", "1m").replace("$api", ".*").replace("$memory", ".*")
        answer = prometheus.get("/api/v1/query", params={"query": filled})
        assert answer.json()["status"] == "success", answer.text
    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
    firing = {rule["name"] for group in rules for rule in group["rules"] if rule["state"] == "firing"}
    assert firing == set()
