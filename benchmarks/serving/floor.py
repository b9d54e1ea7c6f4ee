"""The floor: one uvicorn process with a FastAPI route of the same request and response models, and nothing behind it.

    python -m benchmarks.serving.floor --port 8000

It answers a fixed list of ten items. How much of this is left once memory and model stand behind it is what counts.
"""

from __future__ import annotations

import argparse

import uvicorn
from fastapi import FastAPI

from api.http.schemas.recommend import RecommendRequest, RecommendResponse

ITEMS = 10


def answer(user_id: str | None) -> RecommendResponse:
    """As long as a real one."""
    return {
        "recommendation_id": "b18ce40e078444f9bbb7076f93b0f787",
        "user_id": user_id,
        "source": "memory",
        "items": [{"item_id": str(2987 - n), "score": -3.0373198986053467 - n / 7} for n in range(ITEMS)],
        "memory": {
            "entropy": 0.4661475121974945,
            "k": 13,
            "bank_size": 75,
            "version": 11,
            "own": {"k": 13, "retrieved": 13},
            "collective": {"k": 63, "retrieved": 63},
            "degraded": False,
        },
        "unknown_items": [],
        "model_version": "0359d04318d73190",
    }


def create_app() -> FastAPI:
    app, fixed = FastAPI(), answer(None)

    @app.post("/recommend")
    async def recommend(body: RecommendRequest) -> RecommendResponse:
        return {**fixed, "user_id": body.user_id}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    uvicorn.run(create_app(), host="127.0.0.1", port=port, access_log=False, log_level="warning")  # as `python -m api`


if __name__ == "__main__":
    main()
