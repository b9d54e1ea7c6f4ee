"""An api that is told to stop answers who is connected, and sends them elsewhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2

from api.commands.supervisor import wait_until_ready
from benchmarks.ports import free_port

ROOT = Path(__file__).parents[3]


def test_a_kept_connection_is_answered_once_more_and_then_let_go(run, memory_url):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "api", "--run", str(run), "--port", str(port), "--memory-url", memory_url]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"RAMREC_API_DRAIN_S": "200"})
    try:
        wait_until_ready([process], url)
        with httpx2.Client(base_url=url) as kept:
            assert "connection" not in kept.get("/health/live").headers
            process.terminate()
            while (ready := httpx2.get(f"{url}/health/ready")).status_code == 200:
                assert process.poll() is None
            assert (ready.status_code, ready.json()) == (503, {"status": "about to stop"})
            answer = kept.post("/recommend", json={"sequence": ["i1"]})
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert process.wait(60) == -signal.SIGTERM  # nobody is connected: long before the 200 seconds are over
    finally:
        process.kill()
        process.wait()
