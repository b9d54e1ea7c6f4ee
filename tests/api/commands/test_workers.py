"""What the workers of `ramrec serve` share: their port, and their figures, added up."""

import socket
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from api.http.metrics import ApiMetrics
from api.http.schemas.memories import Interaction
from api.workers import ListenError, Worker, bound
from benchmarks.ports import free_port


def worker(place: Path) -> ApiMetrics:
    return ApiMetrics(worker=Worker(place))


def told(metrics: ApiMetrics) -> dict[str, float]:
    lines = generate_latest(metrics).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_counts_and_sizes_are_sums_and_states_are_those_of_any(tmp_path):
    one, two = worker(tmp_path / "1"), worker(tmp_path / "2")
    for metrics, number in ((one, 1), (two, 2)):
        metrics.requests.labels("/recommend", 200).inc(number)
        metrics.k.observe(number)
    one.requests.labels("/recommend", 503).inc()
    one.works_with("a", "b", stuck=False)
    two.works_with("b", "b", stuck=True)
    alone = told(two)
    together = told(one)
    assert alone['ramrec_api_requests_total{route="/recommend",status="200"}'] == 2
    assert together['ramrec_api_requests_total{route="/recommend",status="200"}'] == 3
    assert together['ramrec_api_requests_total{route="/recommend",status="503"}'] == 1
    assert [together[f'ramrec_api_k_bucket{{le="{le}"}}'] for le in ("0.0", "1.0", "2.0", "+Inf")] == [0, 1, 2, 2]
    assert (together["ramrec_api_k_sum"], together["ramrec_api_k_count"]) == (3, 2)
    assert together["ramrec_api_k_created"] < alone["ramrec_api_k_created"]
    assert together['ramrec_api_model{role="serving",version="a"}'] == 1
    assert together['ramrec_api_model{role="serving",version="b"}'] == 1
    assert together["ramrec_api_model_trouble"] == 1
    assert together["process_resident_memory_bytes"] > 1.5 * alone["process_resident_memory_bytes"]
    assert together["process_start_time_seconds"] == alone["process_start_time_seconds"]


def test_rates_are_those_of_the_sums(tmp_path):
    one, two = worker(tmp_path / "1"), worker(tmp_path / "2")
    unused = {"k": 0, "retrieved": 0}
    memory = {"own": unused, "collective": unused}
    named, *_ = [one.feedback.answered("u", memory, ["a"]) for _ in range(3)]
    two.feedback.answered("u", memory, ["a"])
    two.feedback.taken([Interaction(user_id="u", item_id="a", recommendation_id=named)])
    two.worker.keep(two.registry)
    seen = told(one)
    assert seen['ramrec_api_recommendations_total{k="any",scope="any"}'] == 4
    assert seen['ramrec_api_hit_rate{k="any",scope="any"}'] == 0.25
    assert seen['ramrec_api_click_through{k="0",scope="none"}'] == 0.25


def test_nothing_that_was_told_is_less_later_whoever_dies(tmp_path):
    dead, lives = worker(tmp_path / "1"), worker(tmp_path / "2")
    dead.degraded.inc(5)
    assert told(dead)["ramrec_api_degraded_total"] == 5
    dead.degraded.inc()  # and killed before it told anybody
    lives.degraded.inc(2)
    assert told(lives)["ramrec_api_degraded_total"] == 7
    for _ in range(3):
        new = worker(tmp_path / "1")
        new.degraded.inc()
        new.works_with("a", "a", stuck=False)
        new.worker.keep(new.registry)
    assert told(lives)["ramrec_api_degraded_total"] == told(new)["ramrec_api_degraded_total"] == 10
    assert len([*tmp_path.iterdir()]) == 2


def test_workers_listen_on_one_port_and_each_on_a_socket_of_its_own(tmp_path):
    port = free_port()
    one, two = (Worker(tmp_path / name).listen("127.0.0.1", port) for name in "12")
    for shared, own in (one, two):
        assert shared.getsockname() == ("127.0.0.1", port)
        assert own.family == socket.AF_UNIX
        shared.close()
        own.close()
    with pytest.raises(ListenError, match="cannot listen on"):
        Worker(tmp_path / ("x" * 120)).listen("127.0.0.1", port)


def test_a_name_is_bound_at_all_its_addresses_and_a_taken_port_is_refused():
    port = free_port()
    held = bound("localhost", port)
    assert ("127.0.0.1", port) in [one.getsockname()[:2] for one in held]
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held[0].listen()
        with pytest.raises(OSError, match="in use"):
            stranger.bind(held[0].getsockname())
    for one in held:
        one.close()
