"""Both services against their own OpenAPI documents: thousands of generated calls, valid and not. No answer may be a
failure of the service, and each must be one that the document describes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from api.access.keys import create_key
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import load_checkpoint
from tests.conftest import served

ROOT = Path(__file__).parents[2]
CASES = 1000
"""Calls that each service gets at least."""
EXAMPLES = os.environ.get("RAMREC_TEST_EXAMPLES", "50")
"""Generated calls per operation, beside those that the documents' bounds suggest. `make conformance` sends more."""
EVENTS = [
    {"user_id": user, "item_id": f"i{n % 7 + 1}", "timestamp": n} for n, user in enumerate(["196", "me", "u1"] * 7)
]
MOVING = {"GET /v1/stale", "POST /v1/model"}
"""Accepted only with another checkpoint on the disk, to move to: tests/api/models/test_lifecycle.py."""
# What JSON schemas cannot say is refused all the same: bytes of an id, digits of a number, 5.0 where 5 is meant.
NOT_EXACT = ("positive_data_acceptance",)
# Nor do they say anything of binaries.
BINARY = (*NOT_EXACT, "negative_data_rejection")


@pytest.fixture
def patient_url(valkey_url, run, stack) -> str:
    """A memory service that a busy machine does not make answer 503."""
    settings = MemorySettings(run=run, redis_url=valkey_url, redis_timeout_s=60)
    return stack.enter_context(served(create_memory(settings)))


@pytest.fixture
def seeded_url(patient_url, run, stack) -> str:
    """The api, with something remembered."""
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=patient_url, memory_timeout_s=60))))
    answer = httpx2.post(f"{url}/memories", json={"interactions": EVENTS})
    assert answer.json()["accepted"] == len(EVENTS), answer.text
    assert httpx2.put(f"{url}/items/50", json={"metadata": {"title": "War"}}).status_code == 200
    return url


def conformance(url: str, run: Path, folder: Path, without: tuple[str, ...], *more: str) -> dict:
    """What schemathesis reports about the service at `url`; `more` options go last."""
    report = folder / "report.json"
    options = [
        *("--generation-deterministic", "--no-shrink", "--continue-on-failure", "--no-color"),
        *("--max-examples", EXAMPLES, "--request-timeout", "120", "--exclude-checks", ",".join(without)),
        *("--report", "json", "--report-json-path", str(report), *more),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *options],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.msgpack_cases",
            "RAMREC_TEST_MODEL": load_checkpoint(run, with_weights=False).version,
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def never_accepted(report: dict) -> set[str]:
    """Operations that refused every call: nothing of them was tested."""
    return {
        operation
        for operation, phases in report["valid_rates"].items()
        if not sum(phase["accepted"] for phase in phases.values())
    }


@pytest.mark.timeout(1500)
def test_the_api_answers_as_documented(seeded_url, run, tmp_path):
    report = conformance(seeded_url, run, tmp_path, NOT_EXACT)
    assert report["test_cases"]["generated"] >= CASES
    assert report["operations"]["tested"] == report["operations"]["total"] == len(report["valid_rates"])
    assert not never_accepted(report)


@pytest.mark.timeout(1500)
def test_the_memory_service_answers_as_documented(seeded_url, patient_url, run, tmp_path):
    report = conformance(patient_url, run, tmp_path, BINARY)
    assert report["test_cases"]["generated"] >= CASES
    assert report["operations"]["tested"] == report["operations"]["total"] == len(report["valid_rates"])
    assert never_accepted(report) <= MOVING


@pytest.mark.timeout(1500)
def test_a_guarded_api_answers_as_documented(patient_url, run, tmp_path, stack):
    """`ignored_auth`, among the checks, leaves keys out and sends wrong ones."""
    keys = tmp_path / "keys.json"
    key = create_key(keys, "all", ("recommend", "ingest", "admin"), None)
    settings = ApiSettings(run=run, memory_url=patient_url, memory_timeout_s=60, keys=keys)
    url = stack.enter_context(served(create_api(settings)))
    few = ("--max-examples", "10", "--header", f"Authorization: Bearer {key}")
    report = conformance(url, run, tmp_path, NOT_EXACT, *few)
    assert report["operations"]["tested"] == report["operations"]["total"]
    assert not never_accepted(report)
    metrics = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    assert any('status="401"' in line and not line.endswith(" 0.0") for line in metrics.splitlines())
