"""Which database a command works on: the URL of the settings, the one that DIR remembers, or DIR's embedded PostgreSQL."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kassa.cli import directory as places
from kassa.db import embedded
from kassa.errors import SettingInvalid


@dataclass
class Database:
    """A database that answers."""

    url: str = field(repr=False)
    running: embedded.Running | None = None
    """The embedded server; None: a URL of somebody else's."""


@contextmanager
def database(directory: Path, url: str | None, say: Callable[[str], None], *, make: bool = False) -> Iterator[Database]:
    """The database, running as long as the block; what this process needs no more is stopped at the end.

    url: from the settings; None: what DIR remembers, or its own. make: whether a new one may be made in DIR.
    Raises SettingInvalid when there is none, and what `embedded.start` raises.
    """
    remembered = url or places.recall(directory).database_url
    if remembered is not None:
        yield Database(remembered)
        return
    if not make and not (directory / "postgres").is_dir():
        raise SettingInvalid(
            f"There is no set-up in {directory}. `kassa up --dir {directory}` makes one; "
            "or name a database with --database-url or KASSA_DATABASE_URL."
        )
    with places.using_database(directory) as users:
        running = embedded.start(directory)
        if running.started_by_us:
            for sentence in running.notices:
                say(sentence)
        found = Database(running.dsn, running)
        try:
            yield found
        finally:
            if users.is_last() and found.running is not None:
                embedded.stop(found.running)
