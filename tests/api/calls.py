"""Calls of a running api, as most tests make them."""

import httpx2


def remember(client: httpx2.Client, *events: tuple) -> dict:
    """(user, item) or (user, item, timestamp) each."""
    names = ("user_id", "item_id", "timestamp")
    body = {"interactions": [dict(zip(names, event, strict=False)) for event in events]}
    response = client.post("/memories", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def recommend(client: httpx2.Client, **body) -> dict:
    response = client.post("/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(answer: dict) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def scores(answer: dict) -> dict[str, float]:
    return {item["item_id"]: item["score"] for item in answer["items"]}
