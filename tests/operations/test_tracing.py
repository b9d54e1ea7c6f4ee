"""Traces across both services, with the real SDK, which is not even imported unless it is configured."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.call.context import Call, traceparent
from memory_service.protocol.call.tracing import TracingError, tracer_of
from memory_service.settings import MemorySettings
from tests.conftest import served

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = f"00-{TRACE}-{PARENT}-01"
USER = "somebody-in-particular"


class Kept:
    """A tracer, and the spans that it has made."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("ramrec")

    def spans(self, trace: str = TRACE) -> dict:
        """The spans of a trace, by name."""
        found = self._exporter.get_finished_spans()
        return {span.name: span for span in found if f"{span.context.trace_id:032x}" == trace}


@pytest.fixture
def traced(run, valkey_url):
    """Send requests to traced services; returns the spans of the api and of the memory service."""

    def ask(*calls: tuple[str, str, dict | None]) -> tuple[dict, dict]:
        api, memory = Kept(), Kept()
        with (
            served(create_memory(MemorySettings(run=run, redis_url=valkey_url), memory.tracer)) as memory_url,
            served(create_api(ApiSettings(run=run, memory_url=memory_url), api.tracer)) as url,
        ):
            for method, path, body in calls:
                httpx2.request(method, f"{url}{path}", json=body, headers={"traceparent": SENT}, timeout=30)
        return api.spans(), memory.spans()

    return ask


def test_one_trace_spans_both_services(traced):
    api, memory = traced(("POST", "/recommend", {"user_id": USER}))
    assert set(api) == {"POST /recommend", "recommend", "memory /v1/retrieve", "rank"}
    assert set(memory) == {"POST /v1/retrieve"}
    under = {name: span.parent.span_id for name, span in (api | memory).items()}
    assert f"{under['POST /recommend']:016x}" == PARENT
    assert under["recommend"] == api["POST /recommend"].context.span_id
    assert under["memory /v1/retrieve"] == under["rank"] == api["recommend"].context.span_id
    assert under["POST /v1/retrieve"] == api["memory /v1/retrieve"].context.span_id
    assert api["POST /recommend"].attributes["http.response.status_code"] == 200


def test_spans_name_no_user(traced):
    event = {"user_id": USER, "item_id": "i1"}
    api, memory = traced(
        ("POST", "/memories", {"interactions": [event]}),
        ("GET", f"/users/{USER}/memory", None),
        ("GET", f"/users?prefix={USER}", None),
        ("DELETE", f"/users/{USER}/memory", None),
    )
    assert {"POST /memories", "DELETE /users/{user_id:id}/memory"} <= set(api)
    assert {"POST /v1/plan", "POST /v1/write", "DELETE /v1/user"} <= set(memory)
    assert USER not in str([(span.name, span.attributes, span.status) for span in (api | memory).values()])


def test_a_failure_shows_in_the_trace(run, stack):
    kept = Kept()
    with served(create_api(ApiSettings(run=run, memory_url="http://127.0.0.1:9"), kept.tracer)) as url:
        httpx2.get(f"{url}/users/u/memory", headers={"traceparent": SENT})
    spans = kept.spans()
    assert spans["memory /v1/user"].status.status_code is StatusCode.ERROR
    assert spans["GET /users/{user_id:id}/memory"].status.status_code is StatusCode.ERROR


def test_an_api_without_traces_passes_the_trace_on(run, valkey_url):
    memory = Kept()
    app = create_memory(MemorySettings(run=run, redis_url=valkey_url), memory.tracer)
    with served(app) as memory_url, served(create_api(ApiSettings(run=run, memory_url=memory_url))) as url:
        httpx2.post(f"{url}/recommend", json={"user_id": "u"}, headers={"traceparent": SENT})
    assert f"{memory.spans()['POST /v1/retrieve'].parent.span_id:016x}" == PARENT


def test_malformed_traceparents_are_ignored():
    assert traceparent(SENT.encode()) == SENT
    for odd in (b"", b"x", SENT.encode()[:-1], SENT.replace(TRACE, "0" * 32).encode(), SENT.encode() + b"\n"):
        assert traceparent(odd) is None
    assert "traceparent" not in Call("x").onward()


def test_without_an_endpoint_nothing_is_imported(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert tracer_of("x") is None
    code = "import sys, api.__main__, memory_service.__main__; sys.exit('opentelemetry.exporter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_endpoint_without_the_extra_is_an_error_in_one_line(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    with pytest.raises(TracingError, match=r"ramrec\[otel\]"):
        tracer_of("x")


def test_an_endpoint_turns_traces_on():
    code = "from memory_service.protocol.call.tracing import tracer_of; "
    code += "tracer_of('ramrec-api').start_span('x').end(); print('made')"
    env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "made\n", done.stderr
