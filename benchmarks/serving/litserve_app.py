"""`POST /recommend` behind LitServe. Runs in an environment of its own: see `litserve_peer`.

    python -m benchmarks.serving.litserve_app --port 8000 --run RUN --memory-url URL
    python -m benchmarks.serving.litserve_app --port 8000 --run RUN --redis-url URL
    python -m benchmarks.serving.litserve_app --port 8000

The worker runs our use case as it is (`api.recommend.pipeline`), a batch at a time: with our memory service, or with
the banks and the collective index in the worker itself. The third answers a fixed list: what LitServe costs alone.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import litserve
import msgspec
import torch
import uvloop
from starlette.responses import Response

from api.http.schemas.recommend import RecommendRequest
from api.models.lifecycle import LoadedModels
from api.recommend.pipeline import recommend
from benchmarks.serving.floor import answer
from benchmarks.serving.in_process import with_memory_inside, with_memory_service


class FixedList(litserve.LitAPI):
    """Nothing behind it."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)

    def decode_request(self, request):
        # No annotation: LitServe would have FastAPI make what it names, instead of handing the JSON on.
        return RecommendRequest.model_validate(request)

    def batch(self, inputs: list[RecommendRequest]) -> list[RecommendRequest]:
        return inputs

    def predict(self, batch: list[RecommendRequest]) -> list[Any]:
        return [answer(request.user_id) for request in batch]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Response:
        return Response(msgspec.json.encode(output), media_type="application/json")


class Recommendations(FixedList):
    """Model and memory behind it."""

    def __init__(self, run: Path, memory_url: str | None, redis_url: str | None, **options: Any) -> None:
        super().__init__(**options)
        self._run, self._memory_url, self._redis_url = run, memory_url, redis_url

    def setup(self, device: str) -> None:
        super().setup(device)
        self._events: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._models: LoadedModels = self._events.run_until_complete(self._opened())

    async def _opened(self) -> LoadedModels:
        if self._memory_url:
            return await with_memory_service(self._run, self._memory_url)
        return await with_memory_inside(self._run, self._redis_url or "")

    def predict(self, batch: list[RecommendRequest]) -> list[Any]:
        return self._events.run_until_complete(recommend(self._models, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--memory-url", help="ask this memory service")
    parser.add_argument("--redis-url", help="have the banks of this Redis in the worker")
    parser.add_argument("--batch", type=int, default=64, help="most requests in a batch")
    parser.add_argument("--wait-s", type=float, default=0.001, help="how long a batch waits for more")
    parser.add_argument("--fast-queue", action="store_true", help="ZeroMQ in place of a managed queue")
    asked = parser.parse_args()
    batches = {"max_batch_size": asked.batch, "batch_timeout": asked.wait_s, "api_path": "/recommend"}
    whole = asked.memory_url or asked.redis_url
    api = Recommendations(asked.run, asked.memory_url, asked.redis_url, **batches) if whole else FixedList(**batches)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, healthcheck_path="/health/ready", fast_queue=asked.fast_queue
    )
    server.run(host="127.0.0.1", port=asked.port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
