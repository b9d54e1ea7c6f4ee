"""The Helm chart, rendered by helm: valid for Kubernetes, and what its parts say to each other."""

import json
import subprocess
from functools import cache

import kubernetes_validate
import pytest
import yaml

from api.settings import ApiSettings
from memory_service.settings import MemorySettings
from tests.operations.test_observability import ROOT, alerts, tool

CHART = ROOT / "docker" / "helm" / "ramrec"
SETS = sorted(file.name.removesuffix("-values.yaml") for file in (CHART / "ci").glob("*-values.yaml"))
KUBERNETES = ("1.30", "1.37")
"""Versions that everything is checked against."""
OPERATOR = "monitoring.coreos.com/v1"
"""Kinds of the Prometheus operator: Kubernetes itself has no schema for them."""
SPECS = {"ServiceMonitor": {"selector", "endpoints"}, "PrometheusRule": {"groups"}}
LEAST = {"redis.url": "redis://r", "checkpoint.existingClaim": "c", "api.open": "true", "memory.open": "true"}


def helm(*words: object) -> subprocess.CompletedProcess[str]:
    command = [tool("helm"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@cache
def rendered(values: str) -> list[dict]:
    done = helm("template", "shop", CHART, "--namespace", "rec", "--values", CHART / "ci" / f"{values}-values.yaml")
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def find(values: str, kind: str, name: str) -> dict:
    found = [one for one in rendered(values) if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, (kind, name)
    return found[0]


def workloads(values: str) -> list[dict]:
    return [one for one in rendered(values) if one["kind"] == "Deployment"]


def container(workload: dict) -> dict:
    return workload["spec"]["template"]["spec"]["containers"][0]


def variables(workload: dict) -> dict[str, object]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container(workload)["env"]}


@pytest.mark.parametrize("values", SETS)
def test_lint_finds_nothing(values):
    done = helm("lint", "--strict", CHART, "--values", CHART / "ci" / f"{values}-values.yaml")
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", SETS)
def test_every_object_is_what_kubernetes_expects(values, version):
    objects = rendered(values)
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    for one in objects:
        if one["apiVersion"] == OPERATOR:
            assert set(one["spec"]) == SPECS[one["kind"]]
        else:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("values", SETS)
def test_pods_may_do_nothing_that_they_need_not(values):
    for workload in workloads(values):
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= set(one["resources"])
        mounted = {mount["name"] for mount in container(workload)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("values", SETS)
def test_selectors_choose_the_pods_they_mean(values):
    pods = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in workloads(values)}
    assert len(pods) == 2

    def chosen(labels: dict) -> set[str]:
        return {name for name, has in pods.items() if labels.items() <= has.items()}

    for one in rendered(values):
        name, spec = one["metadata"]["name"], one.get("spec", {})
        if one["kind"] == "Service":
            assert chosen(spec["selector"]) == {name}
        elif one["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert chosen(spec["selector"]["matchLabels"]) == {name}
        elif one["kind"] == "NetworkPolicy" and not name.endswith("redis"):
            assert chosen(spec["podSelector"]["matchLabels"]) == {name}
        elif one["kind"] == "HorizontalPodAutoscaler":
            assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
            assert name in pods
        elif one["kind"] == "ServiceMonitor":
            assert spec["endpoints"][0]["relabelings"][0]["replacement"] == f"ramrec-{name.rpartition('-')[2]}"
    for workload in workloads(values):
        for spread in workload["spec"]["template"]["spec"]["topologySpreadConstraints"]:
            assert chosen(spread["labelSelector"]["matchLabels"]) == {workload["metadata"]["name"]}


@pytest.mark.parametrize("values", SETS)
def test_the_services_are_told_what_they_understand_and_find_each_other(values):
    known = {f"RAMREC_API_{name.upper()}" for name in ApiSettings.model_fields}
    known |= {f"RAMREC_MEMORY_{name.upper()}" for name in MemorySettings.model_fields}
    for workload in workloads(values):
        assert {name for name in variables(workload) if name.startswith("RAMREC")} <= known
    memory, api = (find(values, "Deployment", f"shop-ramrec-{part}") for part in ("memory", "api"))
    service = find(values, "Service", "shop-ramrec-memory")
    port = service["spec"]["ports"][0]
    assert variables(api)["RAMREC_API_MEMORY_URL"] == f"http://{service['metadata']['name']}.rec.svc:{port['port']}"
    listens = {one["name"]: one["containerPort"] for one in container(memory)["ports"]}
    assert listens[port["targetPort"]] == MemorySettings.model_fields["port"].default == port["port"]
    assert "RAMREC_MEMORY_ADVERTISE" not in variables(memory)  # the pod's address, which no other pod has
    assert variables(api).get("RAMREC_API_MEMORY_TOKEN") == variables(memory).get("RAMREC_MEMORY_TOKEN")
    assert ("RAMREC_API_OPEN" in variables(api)) != ("RAMREC_API_KEYS" in variables(api))
    assert ("RAMREC_MEMORY_OPEN" in variables(memory)) != ("RAMREC_MEMORY_TOKEN" in variables(memory))


@pytest.mark.parametrize("values", SETS)
def test_a_pod_that_ends_has_time_to_drain_and_to_send_callers_to_others(values):
    for workload in workloads(values):
        drain = int(container(workload)["lifecycle"]["preStop"]["exec"]["command"][1])
        is_memory = workload["metadata"]["name"].endswith("memory")
        leave = MemorySettings.model_fields["leave_s"].default if is_memory else 0
        open_calls = 10  # timeout_graceful_shutdown of both services
        assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 2 * drain + leave + open_calls


def test_probes():
    """Liveness never asks for what a restart would not bring back; the api stays in the service without memory."""
    for values in ("minimal", "fixed"):
        for workload in workloads(values):
            for kind in ("startupProbe", "livenessProbe"):
                assert container(workload)[kind]["httpGet"]["path"] == "/health/live"
    assert container(workloads("minimal")[0])["readinessProbe"]["httpGet"]["path"] == "/health/live"
    assert container(find("fixed", "Deployment", "shop-ramrec-api"))["readinessProbe"]["httpGet"]["path"].endswith(
        "ready"
    )
    memory = find("minimal", "Deployment", "shop-ramrec-memory")
    assert container(memory)["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def test_secrets_come_from_existing_secrets_only():
    assert not [one for one in rendered("full") if one["kind"] == "Secret"]
    memory, api = (find("full", "Deployment", f"shop-ramrec-{part}") for part in ("memory", "api"))
    token = {"secretKeyRef": {"name": "ramrec-secrets", "key": "token"}}
    assert variables(memory)["RAMREC_MEMORY_TOKEN"] == token
    password = {"secretKeyRef": {"name": "redis-auth", "key": "redis-password"}}
    assert variables(memory)["RAMREC_MEMORY_REDIS_PASSWORD"] == password
    assert "RAMREC_MEMORY_REDIS_PASSWORD" not in variables(api)
    volumes = {one["name"]: one for one in api["spec"]["template"]["spec"]["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == "ramrec-keys"
    mounts = {one["name"]: one["mountPath"] for one in container(memory)["volumeMounts"]}
    assert f"{mounts['redis-ca']}/ca.crt" in variables(memory)["RAMREC_MEMORY_REDIS_URL"]


def test_who_may_reach_whom():
    policies = {one["metadata"]["name"]: one["spec"] for one in rendered("full") if one["kind"] == "NetworkPolicy"}
    assert set(policies) == {"shop-ramrec-api", "shop-ramrec-memory", "shop-ramrec-redis"}
    api, memory, redis = (policies[f"shop-ramrec-{name}"] for name in ("api", "memory", "redis"))
    component = "app.kubernetes.io/component"

    def pods(peers: list[dict]) -> list[dict]:
        return [peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer]

    callers = pods(memory["ingress"][0]["from"])
    assert [one[component] for one in callers] == ["api"]
    assert memory["ingress"][0]["ports"] == [{"port": 8001}]
    assert [one.get(component, one.get("app")) for one in pods(redis["ingress"][0]["from"])] == [
        "memory",
        "redis-cluster",
    ]
    ports = [port["port"] for rule in api["egress"] for port in rule["ports"]]
    assert sorted(ports) == [53, 53, 4318, 8001]  # so not Redis
    assert all("to" in rule for rule in api["egress"] if rule["ports"] != api["egress"][1]["ports"])
    shut = {one["metadata"]["name"]: one["spec"] for one in rendered("fixed") if one["kind"] == "NetworkPolicy"}
    assert shut["shop-ramrec-api"]["ingress"] == []
    assert {"ipBlock": {"cidr": "10.1.0.0/16"}} in shut["shop-ramrec-memory"]["egress"][0]["to"]
    assert not [one for one in rendered("no-policies") if one["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize(("part", "bounds", "fixed"), [("api", (2, 10), 3), ("memory", (3, 40), 1)])
def test_autoscaling_or_a_number_of_replicas(part, bounds, fixed):
    assert "replicas" not in find("full", "Deployment", f"shop-ramrec-{part}")["spec"]
    scaler = find("full", "HorizontalPodAutoscaler", f"shop-ramrec-{part}")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == bounds
    assert scaler["metrics"][0]["resource"]["name"] == "cpu"
    assert "cpu" in container(find("full", "Deployment", f"shop-ramrec-{part}"))["resources"]["requests"]  # its measure
    assert find("fixed", "Deployment", f"shop-ramrec-{part}")["spec"]["replicas"] == fixed
    assert not [one for one in rendered("fixed") if one["kind"] == "HorizontalPodAutoscaler"]


def test_the_checkpoint_is_a_claim_or_comes_with_an_image():
    for workload in workloads("full"):
        pod = workload["spec"]["template"]["spec"]
        run = next(value for name, value in variables(workload).items() if name.endswith("_RUN"))
        assert run == "/srv/checkpoint/2026-11/beauty"
        assert {"claimName": "models", "readOnly": True} in [one.get("persistentVolumeClaim") for one in pod["volumes"]]
        assert "initContainers" not in pod
    for workload in workloads("fixed"):
        pod = workload["spec"]["template"]["spec"]
        into = pod["initContainers"][0]["volumeMounts"][0]
        run = next(value for name, value in variables(workload).items() if name.endswith("_RUN"))
        assert into["mountPath"] == run == container(workload)["volumeMounts"][0]["mountPath"]


def test_alerts_and_dashboard_are_those_of_the_repository():
    rules = find("full", "PrometheusRule", "shop-ramrec")["spec"]["groups"]
    assert [rule for group in rules for rule in group["rules"]] == alerts()
    board = find("full", "ConfigMap", "shop-ramrec-dashboard")["data"]["ramrec.json"]
    assert json.loads(board) == json.loads((ROOT / "docker" / "grafana" / "dashboards" / "ramrec.json").read_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"redis.url": ""}, "redis.url"),
        ({"redis.url": "http://r"}, "url"),
        ({"redis.url": "redis://:secret@r"}, "password"),
        ({"checkpoint.existingClaim": ""}, "either existingClaim or image"),
        ({"checkpoint.image": "i"}, "either existingClaim or image"),
        ({"api.open": "false"}, "api.keys.existingSecret"),
        ({"memory.open": "false"}, "memory.token.existingSecret"),
        ({"memory.replicas": "0"}, "replicas"),
        ({"memory.replica": "2"}, "replica"),
        ({"api.env.PATH": "/x"}, "PATH"),
        ({"checkpoint.run": "../etc"}, "run"),
        (
            {
                "api.open": "false",
                "api.keys.existingSecret": "k",
                "metrics.serviceMonitor.enabled": "true",
            },
            "metricsKey",
        ),
    ],
)
def test_what_does_not_work_is_refused_with_the_reason(changes, words):
    given = [word for name, value in (LEAST | changes).items() for word in ("--set", f"{name}={value}")]
    done = helm("template", "shop", CHART, *given)
    assert done.returncode != 0
    assert words in done.stderr
    assert "secret@" not in done.stderr


def test_names_fit_whatever_the_release_is_called():
    given = [word for name, value in LEAST.items() for word in ("--set", f"{name}={value}")]
    for release in ("r", "my-ramrec", "x" * 53):
        done = helm("template", release, CHART, *given)
        for one in yaml.safe_load_all(done.stdout):
            assert len(one["metadata"]["name"]) <= 63
            kubernetes_validate.validate(one, KUBERNETES[-1], strict=True)
