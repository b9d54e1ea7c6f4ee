"""The compose project as a newcomer and an operator use it, on a real engine: `make test-compose`.

The tests follow one another: each begins with what the one before left running. `--results FILE` keeps what was
measured.
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from benchmarks.memory.crash import at_work, call, compared, remembered
from tests.compose.deployment import ROOT, SECURE, Caller, Project, Writer, is_ready

SERVICES = ("redis", "memory", "api")
QUICK = "[encoder]\ndim = 16\nlayers = 1\nwindow = 20\n[training]\nmax_epochs = 1\nfusion_max_epochs = 1\n"
WRITERS = [Writer(n, "") for n in range(2)]
CLUSTER_WRITERS = [Writer(n, "") for n in range(10, 12)]


@pytest.fixture(scope="module")
def project(tmp_path_factory, measure):
    """Built images, nothing running, no volumes; everything is taken away at the end."""
    folder = tmp_path_factory.mktemp("compose")
    folder.chmod(0o755)
    project = Project("ramrec-test", folder)
    data = folder / "ml-100k"
    project.run(sys.executable, "-m", "api.cli", "data", "ml-100k", "--out", str(data))
    (data / "quick.toml").write_text(QUICK)
    for one in (folder.parent.parent, folder.parent, folder, data):
        one.chmod(one.stat().st_mode | 0o055)
    project.env |= {"ML_100K": str(data), "RAMREC_CONFIG": "/srv/source/quick.toml"}
    project.compose("--profile", "*", "down", "--volumes", "--timeout", "10")
    begin = time.monotonic()
    project.compose("build", "memory", "api")
    measure("building both images, as far as they are not cached", time.monotonic() - begin, "s")
    yield project
    project.files = SECURE
    project.compose("--profile", "*", "down", "--volumes", "--timeout", "10")


def load(url, writers=WRITERS):
    """Writers at work, each noting what was acknowledged."""
    for writer in writers:
        writer.url = url
    return at_work(writer.work_until for writer in writers)


def acknowledged(writers=WRITERS):
    return sum(len(events) for writer in writers for events in writer.acknowledged.values())


def acknowledges(events, writers=WRITERS):
    """Wait until so many events more were acknowledged."""
    before = acknowledged(writers)
    while acknowledged(writers) < before + events:
        time.sleep(0.05)


def losses(url, writers=WRITERS):
    found = {user: remembered(url, user) for writer in writers for user in writer.sent}
    return compared(writers, found)


def banks(project):
    """What is remembered of every writer's users."""
    found = {}
    for user in (user for writer in WRITERS for user in writer.sent):
        memory = call(f"{project.url}/users/{urllib.request.quote(user)}/memory")
        found[user] = {name: memory[name] for name in ("version", "events", "log")}
    return found


def test_images_are_small(project, measure):
    base = json.loads(project.run("docker", "image", "inspect", "python:3.11-slim"))[0]["Size"]
    for name, limit in (("ramrec-memory", 300e6), ("ramrec-api", 1.2e9)):
        added = json.loads(project.run("docker", "image", "inspect", name))[0]["Size"] - base
        measure(f"image {name}, beyond its base image", added / 1e6, "MB", at_most=limit / 1e6)
        assert added < limit


def test_a_wrong_checkpoint_folder_is_said_and_nothing_is_trained_into_it(project, tmp_path):
    project.env["RAMREC_RUN"] = str(tmp_path)
    said = project.compose("run", "--rm", "train", fails=True)
    del project.env["RAMREC_RUN"]
    assert f"RAMREC_RUN={tmp_path} holds no checkpoint" in said
    assert not list(tmp_path.iterdir())


def test_up_from_nothing_trains_a_model_and_serves_it(project, measure):
    project.compose("up", "--detach", "--wait", "--no-build")
    trained = project.compose("logs", "train")
    assert "a demo model is trained on ML-100K" in trained
    events = [{"user_id": "me", "item_id": item, "rating": 5} for item in ("50", "181", "172")]
    assert call(f"{project.url}/memories", {"interactions": events})["accepted"] == 3
    answer = call(f"{project.url}/recommend", {"user_id": "me", "top_n": 5})
    assert (answer["source"], len(answer["items"]), answer["memory"]["bank_size"]) == ("memory", 5, 3)
    for part, holds in (("", "RAMRec inspector"), ("inspector/main.js", "import"), ("inspector/style.css", "color")):
        with urllib.request.urlopen(f"{project.url}/{part}", timeout=10) as page:
            assert holds in page.read().decode()


def test_up_again_finds_the_checkpoint_and_keeps_the_memories(project, measure):
    version = call(f"{project.url}/model")["model_version"]
    project.compose("down", "--timeout", "30")
    begin = time.monotonic()
    project.compose("up", "--detach", "--wait", "--no-build")
    measure("up --wait with a checkpoint", time.monotonic() - begin, "s")
    assert "reusing the checkpoint" in project.compose("logs", "train")
    assert call(f"{project.url}/model")["model_version"] == version
    assert call(f"{project.url}/users/me/memory")["events"] == 3


@pytest.mark.parametrize("service", SERVICES)
def test_containers_may_do_little(project, service):
    about = project.inspect(service)
    host = about["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert min(host["Memory"], host["NanoCpus"], host["PidsLimit"]) > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    published = [one for bindings in (host["PortBindings"] or {}).values() for one in bindings]
    assert {one["HostIp"] for one in published} == ({"127.0.0.1"} if service == "api" else set())
    assert project.execute(service, "id -u").strip() not in ("", "0")
    assert "Read-only file system" in project.execute(service, "touch /x", fails=True)


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back_and_nothing_acknowledged_is_lost(project, service, measure):
    with load(project.url):
        acknowledges(50)
        restarts = project.inspect(service)["RestartCount"]
        project.kill(service)
        seconds = project.recover(service, restarts, project.url)
        measure(f"kill -9 of {service} under load: until everything is ready again", seconds, "s", at_most=15)
        acknowledges(20)  # not ready in word alone
    assert losses(project.url) == {"missing": 0, "phantom": 0, "duplicates": 0}


def test_down_and_up_keeps_every_memory(project, measure):
    before = banks(project)
    assert len(before) > 10
    project.compose("down", "--timeout", "30")
    begin = time.monotonic()
    project.compose("up", "--detach", "--wait", "--no-build")
    measure("up --wait over the volume of a former one", time.monotonic() - begin, "s")
    assert banks(project) == before


def test_a_stopping_api_answers_what_it_accepted(project, measure):
    callers = [Caller(n, project.port) for n in range(8)]
    threads = [threading.Thread(target=one.ask_until_refused) for one in callers]
    with load(project.url):
        for thread in threads:
            thread.start()
        while min(one.outcomes["answered 200"] for one in callers) < 20:
            time.sleep(0.05)
        begin = time.monotonic()
        project.compose("stop", "api")
        measure("stopping the api under load", time.monotonic() - begin, "s")
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    logged = set()
    for line in project.run("docker", "logs", f"{project.name}-api-1").splitlines():
        if line.startswith("{") and '"caller-' in line:
            logged.add(json.loads(line)["request_id"])
    answered = set().union(*(one.answered for one in callers))
    outcomes = sum((one.outcomes for one in callers), start=callers[0].outcomes.__class__())
    measure("requests answered until the api had stopped", len(answered), "requests")
    measure("requests on kept connections without an answer", outcomes["broken"], "requests", at_most=0)
    assert logged
    assert logged <= answered, "answered, the api thinks, and never received"
    assert (outcomes["broken"], set(outcomes) - {"broken"}) == (0, {"answered 200", "refused"})
    assert project.inspect("api")["State"]["ExitCode"] != 137  # it stopped by itself
    project.compose("up", "--detach", "--wait", "--no-build")
    assert losses(project.url) == {"missing": 0, "phantom": 0, "duplicates": 0}


def test_with_keys_token_and_password(project):
    project.compose("down", "--timeout", "30")
    said = project.run("docker/secrets.sh")
    key = next(line for line in said.splitlines() if line.startswith("ramrec_"))
    assert "There are API keys already" in project.run("docker/secrets.sh")
    project.files = SECURE
    project.compose("up", "--detach", "--wait", "--no-build")
    assert is_ready(project.url)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        call(f"{project.url}/recommend", {"user_id": "me"})
    answer = with_key(f"{project.url}/recommend", key, {"user_id": "me"})
    assert answer["memory"]["bank_size"] == 3
    assert "NOAUTH" in project.execute("redis", "redis-cli get x")
    ask = "import urllib.request as u; u.urlopen('http://memory:8001/v1/users')"
    assert "401" in project.execute("api", f'python -c "{ask}"', fails=True)
    secrets = [(ROOT / project.env["RAMREC_SECRETS"] / name).read_text() for name in ("redis_password", "memory_token")]
    for service in SERVICES:
        shown = json.dumps(project.inspect(service)) + project.execute(service, "cat /proc/[0-9]*/cmdline", fails=None)
        assert not [secret for secret in (*secrets, key) if secret in shown]


def test_a_revoked_key_is_refused_by_the_running_api(project):
    key = project.compose("run", "--rm", "keys", "create", "--name", "web", "--scope", "recommend").splitlines()[-1]
    wait_for(lambda: opens(project, key))
    project.compose("run", "--rm", "keys", "revoke", "--name", "web")
    wait_for(lambda: not opens(project, key))


def test_the_cluster_profile_loses_nothing_while_its_parts_are_killed(project, measure):
    """Redis Cluster of six, two memory replicas."""
    project.compose("down", "--timeout", "30")
    project.files = ("docker-compose.yml",)
    begin, url, writers = time.monotonic(), project.cluster_url, CLUSTER_WRITERS
    project.compose("up", "--detach", "--wait", "--no-build", "api-cluster")
    measure("up --wait of the profile cluster", time.monotonic() - begin, "s")
    with load(url, writers):
        for service in ("node-1", "memory-cluster", "api-cluster"):
            acknowledges(50, writers)
            restarts = project.inspect(service)["RestartCount"]
            project.kill(service)
            seconds = project.recover(service, restarts, url)
            measure(f"kill -9 of {service} of the cluster: until all is ready again", seconds, "s", at_most=15)
            acknowledges(50, writers)
    assert losses(url, writers) == {"missing": 0, "phantom": 0, "duplicates": 0}
    before = {user: remembered(url, user) for writer in writers for user in writer.sent}
    project.compose("--profile", "cluster", "down", "--timeout", "30")
    project.compose("up", "--detach", "--wait", "--no-build", "api-cluster")
    assert {user: remembered(url, user) for user in before} == before


def test_memory_replicas_come_and_go_under_load_without_a_refusal(project, measure):
    """Three by `--scale`, then two again: the api finds the new one by itself and leaves the one that stops alone."""
    assert [project.metric("ramrec_memory_replicas", number) for number in (1, 2)] == [2, 2]
    with load(project.cluster_url, CLUSTER_WRITERS):
        acknowledges(20, CLUSTER_WRITERS)
        refused = sum(writer.refused for writer in CLUSTER_WRITERS)
        scale(project, 3)
        wait_for(lambda: project.metric("ramrec_memory_replicas", 1) == 3)
        wait_for(lambda: project.metric("ramrec_memory_users_retrieved_total", 3) > 0)
        begin = time.monotonic()
        scale(project, 2)
        measure("stopping a memory replica of the cluster under load", time.monotonic() - begin, "s")
        wait_for(lambda: project.metric("ramrec_memory_replicas", 1) == 2)
        acknowledges(50, CLUSTER_WRITERS)
        refused = sum(writer.refused for writer in CLUSTER_WRITERS) - refused
    measure("calls refused while a memory replica of the cluster came and went", refused, "calls", at_most=0)
    assert refused == 0
    assert losses(project.cluster_url, CLUSTER_WRITERS) == {"missing": 0, "phantom": 0, "duplicates": 0}


def scale(project, replicas):
    """Have so many replicas of the cluster's memory service."""
    many = f"memory-cluster={replicas}"
    project.compose("up", "--detach", "--wait", "--no-build", "--no-recreate", "--scale", many, "api-cluster")


def with_key(url, key, body):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=10) as answer:
        return json.load(answer)


def opens(project, key):
    """Whether the api takes a key."""
    try:
        with_key(f"{project.url}/recommend", key, {"user_id": "me"})
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        return False
    return True


def wait_for(condition):
    """Until it holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
