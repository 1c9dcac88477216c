"""`kassa sandbox NAME`: one provider's sandbox on its own, in the foreground."""

import os
import sys
from pathlib import Path

import click

from kassa.cli import directory as places
from kassa.cli.output import json_option
from kassa.cli.sandboxes import SANDBOXES
from kassa.settings import load


@click.command()
@click.argument("name", type=click.Choice(list(SANDBOXES)))
@click.option(
    "--dir", "directory", metavar="DIR", help="Where its keys and books live [default: .kassa/sandboxes/NAME]."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: the one it had before, or a free one.")
@json_option
def sandbox(name: str, directory: str | None, port: int, as_json: bool) -> None:
    """A fake provider that speaks the real signed wire, keeps its own books, and fails on demand."""
    place = Path(directory) if directory is not None else Path(load().settings.dir) / "sandboxes" / name
    places.make(place.absolute())
    options = ["--dir", str(place), "--port", str(port), *(["--json"] if as_json else [])]
    # Becomes the sandbox: one process less, and signals reach it directly.
    os.execv(sys.executable, [sys.executable, "-m", SANDBOXES[name], *options])
