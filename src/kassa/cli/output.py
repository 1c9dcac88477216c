"""How commands speak: to people with tables and sentences, to programs with one JSON document on standard output."""

import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

from kassa.money.amount import format_amount

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def show(document: Any, as_json: bool, people: Callable[[], None]) -> None:
    """The document for a program, or `people()` for a person."""
    if as_json:
        print(encoded(document), flush=True)
    else:
        people()


def encoded(document: Any) -> str:
    """One line of JSON."""
    return msgspec.json.encode(document, enc_hook=str).decode()


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table on standard output. right: the heads of columns with numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        drawn.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else _plain(str(cell)) for cell in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A pipe has no width; ids must not be folded there.
        console.width = 200
    console.print(drawn)


def _plain(text: str) -> str:
    """Keys and reasons may be a stranger's, and tell a terminal to hide what is there."""
    return text if text.isprintable() else "".join(one if one.isprintable() else "\ufffd" for one in text)


def note(sentence: str) -> None:
    """Something that a person should read, beside the result."""
    print(sentence, file=sys.stderr, flush=True)


def money(amount: int, currency: str) -> str:
    """Minor units as people write them: 1234 CNY is «12.34 CNY»."""
    return format_amount(amount, currency)


def when(at: datetime | None) -> str:
    """A time to the second, UTC."""
    return "" if at is None else at.strftime("%Y-%m-%d %H:%M:%S")
