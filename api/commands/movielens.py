"""MovieLens 100K.

GroupLens' terms ask for citation (Harper and Konstan 2015, https://doi.org/10.1145/2827872) and forbid redistribution
without permission.
"""

from __future__ import annotations

from pathlib import Path

from api.commands.wheels import WheelSource, are_intact, fetch, write

ML_100K = WheelSource(
    name="ML-100K",
    wheel="recbole==1.2.1",
    folder="recbole/dataset_example/ml-100k",
    sha256={
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
)


def fetch_ml_100k(out: Path, source: Path | None = None) -> Path:
    """Write `ml-100k.inter` and `ml-100k.item` to the folder `out`. Files that are there and intact are kept.

    Args:
        source: the RecBole wheel, or a folder with the two files (default: download the wheel).

    Returns:
        `out`, which `model.data.dataset.read_dataset` takes.

    Raises:
        DatasetError: the download failed, a file is missing from `source` or has another checksum, or `out` cannot be
            written.
    """
    if not are_intact(out, ML_100K.sha256):
        write(out, fetch(ML_100K, source), ML_100K.name)
    return out
