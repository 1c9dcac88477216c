"""What an installation keeps in its directory DIR, and who may use it at the same time.

DIR/up.json          API key, merchant, port, database URL of `kassa up`, mode 0600
DIR/lock             held by the one `kassa up` that runs
DIR/database.lock    held, shared, by whoever uses the embedded PostgreSQL; the last one to let go stops it
DIR/sandboxes/NAME/  a sandbox's keys and books; NAME.json says which process it is, NAME.log what it says
DIR/postgres/        the embedded PostgreSQL (kassa.db.embedded)
DIR/secrets.key, anchor.key, kassa.toml
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from kassa.errors import SettingInvalid


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """What `kassa up` goes on with when it is started again."""

    api_key: str | None = None
    merchant: str | None = None
    """`mch_…`"""
    port: int | None = None
    database_url: str | None = None
    """None: the embedded PostgreSQL."""
    brokers: tuple[str, ...] = ()
    """For the other commands; `kassa up` itself takes those that it is told."""
    order_queue: str | None = None


def make(directory: Path) -> None:
    """The directory, if it is not there: for its owner alone, as far as PostgreSQL can live with that."""
    if directory.is_dir():
        return
    # As root, PostgreSQL runs as another user, who must be able to pass through; each file inside has its own mode.
    directory.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)


def recall(directory: Path) -> Remembered:
    """What was remembered; empty at first. Raises SettingInvalid when the file cannot be understood."""
    file = directory / "up.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=Remembered)
    except FileNotFoundError:
        return Remembered()
    except msgspec.DecodeError as error:
        raise SettingInvalid(f"{file} cannot be understood ({error}); move it aside to make a new key.") from error


def remember(directory: Path, remembered: Remembered) -> None:
    """Keeps it for the next start. A crash leaves the old or the new text, never half of one."""
    write_private(directory / "up.json", msgspec.json.format(msgspec.json.encode(remembered)) + b"\n")


def write_private(file: Path, content: bytes) -> None:
    """A file that only its owner can read, whole or not at all."""
    fresh = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    fresh.replace(file)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Only one `kassa up` on a directory. The kernel lets go of the lock when its holder dies, however it dies."""
    with _opened(directory / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise click.ClickException(
                f"Another `kassa up` (pid {holder}) runs on {directory}. Stop it first, or use another --dir."
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield


@contextmanager
def using_database(directory: Path) -> Iterator["LastOne"]:
    """Counts as a user of the embedded PostgreSQL. Waits while another process stops it."""
    with _opened(directory / "database.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield LastOne(lock)


class LastOne:
    """Finds out whether nobody else uses the database."""

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def is_last(self) -> bool:
        """True: nobody else does, and nobody can begin to before this process lets go."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)
