"""results.json as a Markdown table and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from safetensors import safe_open

PUBLISHED = {  # unmasked HR@5 HR@10 NDCG@5 NDCG@10, the RAMRec paper's table
    "ml-100k": {"SASRec": (0.0721, 0.1347, 0.0454, 0.0654), "RaSeRec": (0.0774, 0.1421, 0.0474, 0.0665),
                "RAMRec (paper)": (0.0797, 0.1531, 0.0498, 0.0702)},
    "beauty": {"SASRec": (0.0365, 0.0627, 0.0236, 0.0281), "RaSeRec": (0.0569, 0.0865, 0.0369, 0.0465),
               "RAMRec (paper)": (0.0566, 0.0876, 0.0376, 0.0480)},
    "ml-1m": {"SASRec": (0.1087, 0.1904, 0.0638, 0.0910), "RaSeRec": (0.1639, 0.2365, 0.1002, 0.1250),
              "RAMRec (paper)": (0.1689, 0.2572, 0.1180, 0.1492)},
    "sports": {"SASRec": (0.0218, 0.0336, 0.0127, 0.0169), "RaSeRec": (0.0331, 0.0497, 0.0211, 0.0264),
               "RAMRec (paper)": (0.0339, 0.0521, 0.0218, 0.0284)},
}  # fmt: skip
FIGURES = ("hr@5", "hr@10", "ndcg@5", "ndcg@10")
TARGETS = {  # NDCG@10, HR@10 unmasked; the same masked; memory's own gain in NDCG@10
    "beauty": (0.055, 0.096, 0.064, 0.105, 0.10),
    "sports": (0.031, 0.056, 0.0365, 0.063, 0.10),
    "ml-1m": (0.180, 0.310, 0.200, 0.340, 0.02),
    "ml-100k": (0.100, 0.195, 0.118, 0.225, 0.01),
}
LADDER = (  # what is shown of each dataset: name, variant, store
    ("encoder", "encoder", "none"),
    ("encoder, calibrated", "encoder+calibration", "none"),
    ("**with memory**, store `train`", "memory", "train"),
    ("**with memory**, store `live`", "memory", "live"),
    ("shuffled memory, store `train`", "shuffled", "train"),
)
SHOWN = ("encoder", "encoder+calibration", "own", "collective", "memory", "shuffled")


def write(results: dict[str, Any], folder: Path, runs: dict[str, Path]) -> None:
    """results.md and the PNG files in `folder`."""
    (folder / "results.md").write_text(summary(results) + "\n" + table(results))
    training_curves(runs, folder / "training.png")
    for name, study in results["experiments"].items():
        if name.startswith("adaptive-k-"):
            k_against_entropy(study, name.removeprefix("adaptive-k-"), folder / f"{name}.png")
    if "over-time-ml-100k" in results["experiments"]:
        over_time(results["experiments"]["over-time-ml-100k"], folder / "over-time.png")


def summary(results: dict[str, Any]) -> str:
    """What the targets are about, beside targets and published figures, as Markdown."""
    lines = [
        "| NDCG@10 / HR@10 | seeds | unmasked | masked | memory's gain, unmasked | masked |",
        "|---|---|---|---|---|---|",
    ]
    rows = {_label(row): row for row in results["rows"]}
    gains = {_label(gain): gain for gain in results["gains"]}
    for name in dict.fromkeys(row["dataset"] for row in results["rows"]):
        lines.append(f"| **{name}** | | | | | |")
        for title, variant, store in LADDER:
            both = [(name, variant, protocol, store) for protocol in ("unmasked", "masked")]
            figures = [f"{_short(rows[one]['ndcg@10'])} / {_short(rows[one]['hr@10'])}" for one in both]
            over = [_gain(gains.get(one)) for one in both]
            lines.append(f"| {title} | {rows[both[0]]['seeds']} | {' | '.join([*figures, *over])} |")
        target = TARGETS[name]
        figures = [f"{_short(target[n])} / {_short(target[n + 1])}" for n in (0, 2)]
        lines.append(f"| target, store `train` | | {' | '.join(figures)} | +{target[4]:.0%} | +{target[4]:.0%} |")
        published = PUBLISHED[name]["RAMRec (paper)"]
        lines.append(f"| published RAMRec | | {_short(published[3])} / {_short(published[1])} | | | |")
    return "\n".join(lines) + "\n"


def _gain(gain: dict[str, Any] | None) -> str:
    return f"{gain['gain']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]" if gain else ""


def table(results: dict[str, Any]) -> str:
    """All main rows beside the published ones, as Markdown."""
    lines = ["| dataset | protocol | store | variant | seeds | HR@5 | HR@10 | NDCG@5 | NDCG@10 | memory's gain |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    gains = {_label(gain): gain for gain in results["gains"]}
    for row in results["rows"]:
        if row["variant"] in SHOWN:
            over = _gain(gains.get(_label(row)))
            figures = " | ".join(_short(row[name]) for name in FIGURES)
            start = " | ".join(str(row[key]) for key in ("dataset", "protocol", "store", "variant", "seeds"))
            lines.append(f"| {start} | {figures} | {over} |")
    for name in dict.fromkeys(row["dataset"] for row in results["rows"]):
        for who, figures in PUBLISHED[name].items():
            lines.append(f"| {name} | unmasked | | published: {who} | | {' | '.join(_short(f) for f in figures)} | |")
    return "\n".join(lines) + "\n"


def _label(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("dataset", "variant", "protocol", "store"))


def _short(figure: float) -> str:
    return f"{figure:.4f}".lstrip("0")


def training_curves(runs: dict[str, Path], file: Path) -> None:
    """Validation NDCG@10 of the encoder by epoch."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, run in runs.items():
        with safe_open(run / "training.safetensors", framework="np") as opened:
            history = json.loads(opened.metadata()["progress"])["history"]
        axes.plot(range(1, len(history) + 1), [one["ndcg@10"] for one in history], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="validation NDCG@10", title="Encoder, seed 0, what was had left out")
    _finish(figure, axes, file)


def k_against_entropy(study: dict[str, Any], name: str, file: Path) -> None:
    """K of 400 users against their entropy, and by entropy quintile how fixed K does against adaptive K."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    users = study["users"]
    shown = left.scatter(users["entropy"], users["k"], c=users["bank_size"], s=14, cmap="viridis")
    left.scatter(users["entropy"], users["collective_k"], s=8, marker="x", color="tab:orange", label="collective")
    figure.colorbar(shown, ax=left, label="entries in the bank (own scope, dots)")
    left.set(xlabel="entropy H", ylabel="K", title=f"{name}: K follows entropy")
    left.legend()
    curves = study["collective"]["by_entropy_quintile"]
    for k, values in curves.items():
        style = {"linewidth": 2.5, "color": "black"} if k == "adaptive" else {"linewidth": 1}
        over = [100 * (value / ours - 1) for value, ours in zip(values, curves["adaptive"], strict=True)]
        right.plot(range(1, 6), over, marker=".", label=f"K {k}", **style)
    right.set(xlabel="entropy quintile (1 = least diverse)", ylabel="% of NDCG@10 over adaptive K", xticks=range(1, 6))
    right.set_title("collective K: fixed against adaptive")
    _finish(figure, right, file)


def over_time(study: dict[str, Any], file: Path) -> None:
    """HR@10 over the stream."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in study["curves"].items():
        axes.plot([72.5 + 5 * n for n in range(len(points))], [one["hr@10"] for one in points], marker="o", label=name)
    axes.set(xlabel="% of all interactions, by the clock", ylabel="HR@10", title="ML-100K streamed after 70 %", ylim=0)
    _finish(figure, axes, file)


def _finish(figure: Any, axes: Any, file: Path) -> None:
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
