"""Named SQL, read from files beside the code that uses it.

    -- name: move_attempt
    -- Move an attempt if nobody moved it since it was read.
    UPDATE attempt …

A block begins with its name; the comment that follows says what it is for; the rest is one statement with $1, $2 ….
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files

from kassa.errors import InvariantBroken

_NAME = re.compile(r"^--\s*name:\s*(\S+)\s*$", re.MULTILINE)


_OWN_NAMES = {*dir(Mapping), "origin", "sentences"}


class Queries(Mapping[str, str]):
    """SQL by name: `queries.move_attempt` or `queries["move_attempt"]`. An unknown name says what is close to it."""

    def __init__(self, origin: str, statements: Mapping[str, str], sentences: Mapping[str, str]) -> None:
        self.origin = origin
        self.sentences = sentences
        """What each query is for."""
        self._statements = statements

    def __getitem__(self, name: str) -> str:
        if name not in self._statements:
            raise KeyError(self._unknown(name))
        return self._statements[name]

    def __getattr__(self, name: str) -> str:
        # Reached only for what is no attribute of its own; `_statements` is missing while a copy is being made.
        if name.startswith("_") or name not in self._statements:
            raise AttributeError(name if name.startswith("_") else self._unknown(name))
        return self._statements[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statements)

    def __len__(self) -> int:
        return len(self._statements)

    def _unknown(self, name: str) -> str:
        close = get_close_matches(name, self._statements, n=3)
        return f"{self.origin} has no query named {name}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def array(values: Iterable[str]) -> str:
    """An array of ids or numbers as PostgreSQL reads it, for `$1::text::uuid[]`. Of a list asyncpg asks each element whether it is
    a list itself, by checks of abstract classes: with six of nine sent so, a send took 22 µs of processor a record and not 25."""
    return "{" + ",".join(values) + "}"


def load(package: str, file: str = "queries.sql") -> Queries:
    """The queries of one package, e.g. load("kassa.payments"). Raises InvariantBroken as `parse` does."""
    return parse(files(package).joinpath(file).read_text(encoding="utf-8"), origin=f"{package}/{file}")


def parse(text: str, *, origin: str) -> Queries:
    """The queries in `text`; `origin` is for messages.

    Raises InvariantBroken for a name that is used twice or cannot be one, and for an empty query.
    """
    parts = _NAME.split(text)
    statements: dict[str, str] = {}
    sentences: dict[str, str] = {}
    for name, block in zip(parts[1::2], parts[2::2], strict=True):
        if not name.isidentifier() or name.startswith("_") or name in _OWN_NAMES:
            raise InvariantBroken(f"{origin}: {name} cannot name a query")
        if name in statements:
            raise InvariantBroken(f"{origin}: two queries are named {name}")
        sentence, statement = _split(block)
        if not statement:
            raise InvariantBroken(f"{origin}: the query {name} is empty")
        statements[name], sentences[name] = statement, sentence
    return Queries(origin, statements, sentences)


def _split(block: str) -> tuple[str, str]:
    """The sentence and the statement of a block. Comments at its end belong to what follows, so they are dropped."""
    lines = block.strip().split("\n")
    first = next((index for index, line in enumerate(lines) if not _is_comment(line)), len(lines))
    last = next((index for index in range(len(lines) - 1, -1, -1) if not _is_comment(lines[index])), -1)
    sentence = " ".join(line.strip().removeprefix("--").strip() for line in lines[:first])
    return sentence, "\n".join(lines[first : last + 1]).strip().removesuffix(";").strip()


def _is_comment(line: str) -> bool:
    return line.strip().startswith("--") or not line.strip()
