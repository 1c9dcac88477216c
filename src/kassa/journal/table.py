"""How a noun tells the journal about its rows: one record type, one `Table` made from it. Pure.

A record's fields are the table's columns, in order. The first ones are fixed for every table:
`home, id, version` and, for a root, `sequence` (how many events it has had); for a child, `root` (its root's id).
What may change later is named in `mutable`; everything else is written once.
"""

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import Any

import msgspec

from kassa.ids import Id


class Record(msgspec.Struct, frozen=True, gc=False):
    """What every row of the journal has."""

    home: int
    """Whose it is: a merchant's home, or 0 for the system's own."""
    id: Id
    version: int
    """0 when new; counts the moves."""

    @property
    def root_id(self) -> Id:
        """The id of the root under whose lock this row changes."""
        return self.id


class Root(Record, frozen=True, gc=False):
    """A thing with a life of its own: payment, wallet, merchant, endpoint. Its lock protects its children."""

    sequence: int
    """How many events it has had."""
    state: str


class Child(Record, frozen=True, gc=False):
    """A part of a root: an attempt or refund of a payment, a delivery of an endpoint."""

    root: Id
    state: str

    @property
    def root_id(self) -> Id:
        return self.root


_POSTGRES_TYPES: dict[Any, str] = {
    int: "bigint", str: "text", datetime: "timestamptz", bytes: "bytea", bool: "boolean", Id: "uuid",
}  # fmt: skip


_Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def _picking(places: Sequence[int]) -> _Pick:
    """Takes the values at these places out of a tuple, as a tuple. In C: each change of a row needs it four times."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


def _postgres_type(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return _postgres_type(inner[0])
    return _POSTGRES_TYPES[annotation]


@dataclass(frozen=True, eq=False)
class Table:
    """One table of the journal.

    number: names the table in the history for ever; never used again for another.
    """

    number: int
    name: str
    record: type[Record]
    mutable: Sequence[str]
    parent: "Table | None" = None
    columns: tuple[str, ...] = field(init=False)
    column_types: tuple[str, ...] = field(init=False)
    mutable_at: tuple[int, ...] = field(init=False)
    fixed_at: tuple[int, ...] = field(init=False)
    stored_columns: tuple[str, ...] = field(init=False)
    """With the place of the change that made the row."""
    stored_types: tuple[str, ...] = field(init=False)
    _mutable: _Pick = field(init=False)
    _fixed: _Pick = field(init=False)
    _ids_at: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(self.record)
        columns = self.record.__struct_fields__
        changing = {"state", *self.mutable}
        bookkeeping = {"version", "sequence"}
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "column_types", tuple(_postgres_type(hints[name]) for name in columns))
        object.__setattr__(self, "stored_columns", (*columns, "writer", "seq", "ord"))
        object.__setattr__(self, "stored_types", (*self.column_types, "smallint", "bigint", "smallint"))
        object.__setattr__(self, "mutable_at", tuple(i for i, name in enumerate(columns) if name in changing))
        object.__setattr__(
            self, "fixed_at", tuple(i for i, name in enumerate(columns) if name not in changing | bookkeeping)
        )
        object.__setattr__(self, "_ids_at", tuple(i for i, type in enumerate(self.column_types) if type == "uuid"))
        object.__setattr__(self, "_mutable", _picking(self.mutable_at))
        object.__setattr__(self, "_fixed", _picking(self.fixed_at))

    @property
    def is_root(self) -> bool:
        return self.parent is None

    def values(self, record: Record) -> tuple[Any, ...]:
        """The record as a tuple in column order."""
        return msgspec.structs.astuple(record)

    def read(self, row: Sequence[Any]) -> Record:
        """A record from a database row in column order."""
        values = list(row)
        for i in self._ids_at:
            values[i] = plain(values[i])
        return self.record(*values)

    def mutable_values(self, record: Record) -> tuple[Any, ...]:
        """What of the record may change, in column order."""
        return self._mutable(msgspec.structs.astuple(record))

    def fixed_values(self, record: Record) -> tuple[Any, ...]:
        """What of the record never changes, in column order."""
        return self._fixed(msgspec.structs.astuple(record))

    def parts(self, record: Record) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(what never changes, what may change), each in column order."""
        values = msgspec.structs.astuple(record)
        return self._fixed(values), self._mutable(values)


def plain(value: Any) -> Any:
    """asyncpg gives UUID objects; inside Kassa an id is its 32 digits."""
    digits = getattr(value, "hex", None)
    return digits if isinstance(digits, str) else value


class Tables:
    """All tables that one journal writes, found by record type, by number and by name."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.all = tuple(sorted(tables, key=lambda table: table.number))
        self.by_record = {table.record: table for table in self.all}
        self.by_number = {table.number: table for table in self.all}
        self.by_name = {table.name: table for table in self.all}

    def of(self, record: Record) -> Table:
        """The table that a record belongs to."""
        return self.by_record[type(record)]
