"""PostgreSQL of our own: made, started, adopted and stopped in a directory of Kassa's. All of it blocks; use a thread.

    DIRECTORY/postgres/        password, port (0600), lock; `place` when the rest had to go elsewhere; otherwise also
      data/                    PostgreSQL's own, 0700, with our settings in kassa.conf
      run/                     the Unix socket, 0700
      log, owner.json          what the server says; which server Kassa started here

A server survives a `kill -9` of everything else and is adopted by the next start. Only one that Kassa started is
ever stopped.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from kassa.db.account import Account, can_enter, run_as, server_account
from kassa.db.binaries import Binaries, find_binaries, newest_of_debian
from kassa.errors import DatabaseRefused, DatabaseUnreachable

USER = "kassa"
DATABASE = "kassa"
ELSEWHERE = Path("/var/lib/kassa")
"""Where data goes when the server's user cannot reach the directory."""

SETTINGS: Mapping[str, str] = {
    "max_connections": "100",
    "max_prepared_transactions": "64",
    # Kassa idles within 250 MB; only what is touched counts, and the writer's working set is small.
    "shared_buffers": "128MB",
    "max_wal_size": "4GB",
    "checkpoint_completion_target": "0.9",
    "fsync": "on",
    "synchronous_commit": "on",
    # What was deleted without waiting for the disk, as queues do, is looked at by each claim until the log is on the disk. So it
    # is written at once, by a process of its own.
    "wal_writer_delay": "20ms",
    "wal_writer_flush_after": "0",
    "full_page_writes": "on",
    "default_transaction_isolation": "read committed",
    # No transaction is open across a network call, so a minute means that its owner is stuck or gone.
    "idle_in_transaction_session_timeout": "60s",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%a ",
}

_START_TIMEOUT_S = 120
"""Recovery after a crash replays at most max_wal_size, which takes a slow disk a minute."""
_STOP_TIMEOUT_S = 60
"""A fast shutdown writes one checkpoint; past this, an immediate one, from which the next start recovers."""
_PORT_TRIES_MAX = 5
_LINGERING_TRIES_MAX = 20
_LOG_BYTES_MAX = 10_000_000
_SOCKET_PATH_BYTES_MAX = 107
"""sun_path of Linux and the ending zero; macOS has 104, and takes the fallback a little late."""
_PID_OF_NOBODY = 4_194_305
"""One more than Linux ever gives to a process."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server on a directory of Kassa's."""

    dsn: str = field(repr=False)
    """Over TCP, with the password in it: do not log it."""
    pid: int
    directory: Path
    """PostgreSQL's data directory."""
    home: Path
    """The directory that `start` was given."""
    port: int
    user: str
    """Kassa's role in the database."""
    socket_directory: Path
    account: Account
    """Who the server runs as."""
    binaries: Binaries
    """The programs of this server's version: psql, pg_dump, pgbench …"""
    started_by_us: bool
    """True when this call started it, False when it was found running."""
    is_kassas: bool
    """Whether any Kassa started it on this directory; if not, `stop` leaves it alone."""
    notices: tuple[str, ...]
    """Sentences that the user should read."""

    @property
    def socket_dsn(self) -> str:
        """Over the Unix socket, without a password; only for the server's user and root."""
        return f"postgresql://{self.user}@/{DATABASE}?host={self.socket_directory}&port={self.port}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything of one directory lies."""

    home: Path
    base: Path
    account: Account

    @property
    def own(self) -> Path:
        """What Kassa alone reads: password, port, lock."""
        return self.home / "postgres"

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.base / "data"

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.base / "log"


@dataclass(frozen=True, slots=True)
class PidFile:
    """The lines of postmaster.pid that we use. Source: PostgreSQL, src/include/utils/pidfile.h."""

    pid: int
    started_at_s: int
    port: int
    socket_directory: Path
    is_ready: bool


def start(directory: Path, *, settings: Mapping[str, str] | None = None) -> Running:
    """A server on `directory` that accepts connections: found running and adopted, or made and started.

    settings: PostgreSQL settings that go before SETTINGS; they count from the next real start.
    Safe to call from two processes at once: the second adopts what the first started.
    Raises DatabaseRefused when the directory is not one that this program may use, DatabaseUnreachable when the server
    does not come up; both say what to do.
    """
    home = directory.absolute()
    (home / "postgres").mkdir(parents=True, exist_ok=True)
    with _locked(home):
        place, notices = _place(home)
        binaries, more = find_binaries(place.account, place.base / "programs")
        notices += more
        _refuse_other_major(place, binaries)
        found = _running_postmaster(place)
        if found is None:
            notices += _prepare(place, binaries)
            _start_server(place, binaries, {**SETTINGS, **(settings or {})}, notices)
        return _ready(place, binaries, notices, started_by_us=found is None)


def stop(running: Running) -> bool:
    """Stop the server cleanly and wait for its end.

    False, and nothing is done, when it is gone or Kassa did not start it.
    """
    with _locked(running.home):
        place, _ = _place(running.home)
        lines = _running_postmaster(place)
        if lines is None or lines.pid != running.pid or not _is_kassas(place, lines):
            return False
        for sign, timeout_s in ((signal.SIGINT, _STOP_TIMEOUT_S), (signal.SIGQUIT, _STOP_TIMEOUT_S)):
            os.kill(lines.pid, sign)
            if _wait_for_end(place, lines.pid, timeout_s):
                (place.base / "owner.json").unlink(missing_ok=True)
                return True
        raise DatabaseUnreachable(f"PostgreSQL (pid {lines.pid}) does not stop; see {place.log}.")


def find(directory: Path) -> Running | None:
    """The server that runs on `directory` now, or None; starts and changes nothing."""
    home = directory.absolute()
    if not (home / "postgres").is_dir():
        return None
    with _locked(home):
        place, notices = _place(home)
        if not place.data.exists() or _running_postmaster(place) is None:
            return None
        binaries, more = find_binaries(place.account, place.base / "programs")
        return _ready(place, binaries, notices + more, started_by_us=False)


def execute(running: Running, sql: str, *, database: str = DATABASE) -> str:
    """Run SQL as the superuser over the Unix socket; its rows as unaligned text. For setting up, not for work.

    Raises DatabaseUnreachable with the server's own words.
    """
    return _psql(running.account, running.binaries, running.socket_directory, running.port, sql, database=database)


@contextmanager
def temporary_directory(prefix: str = "kassa-") -> Iterator[Path]:
    """A directory that the server's user can reach, removed at the end. Stop the server first."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        # mkdtemp makes 0700; others may pass through, and each file inside keeps its own mode.
        path.chmod(0o711)
        yield path
    finally:
        shutil.rmtree(path)


# Where things lie


def _place(home: Path) -> tuple[Place, list[str]]:
    own = home / "postgres"
    remembered = own / "place"
    base = Path(remembered.read_text().strip()) if remembered.exists() else own
    data = base / "data"
    account = server_account(_owner_of(data))
    notices = [f"PostgreSQL does not run as root, so it runs as the user {account.name}."] if account.switch else []
    if remembered.exists() and not base.is_dir():
        raise DatabaseRefused(
            f"The database of {home} was kept in {base}, which is gone; bring it back, or remove {remembered}."
        )
    if not remembered.exists() and not can_enter(account, own):
        if data.exists():
            raise DatabaseRefused(
                f"The user {account.name}, to whom {data} belongs, cannot reach it; open its parents (chmod o+x)."
            )
        base = _make_elsewhere(home)
        _write_private(remembered, f"{base}\n")
    if base != own:
        notices.append(f"The user {account.name} cannot reach {home}, so the database is kept in {base}.")
    return Place(home=home, base=base, account=account), notices


def _owner_of(data: Path) -> int | None:
    try:
        return data.stat().st_uid
    except FileNotFoundError:
        return None


def _make_elsewhere(home: Path) -> Path:
    """A new place for the data of `home`, named at random: a later DIR of the same name must not find old data."""
    base = ELSEWHERE / secrets.token_hex(8)
    base.mkdir(parents=True)
    for directory in (ELSEWHERE, base):
        directory.chmod(0o755)
    (base / "belongs_to").write_text(f"{home}\n")
    return base


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One start or stop at a time on a directory; the kernel lets go of the lock when its holder dies."""
    with (home / "postgres" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Making


def _refuse_other_major(place: Place, binaries: Binaries) -> None:
    file = place.data / "PG_VERSION"
    if not file.exists():
        return
    theirs = file.read_text().strip()
    if theirs == str(binaries.major):
        return
    old = newest_of_debian(major=int(theirs)) if theirs.isdigit() else None
    old_bin = str(old) if old else f"/usr/lib/postgresql/{theirs}/bin"
    raise DatabaseRefused(
        f"{place.data} was made by PostgreSQL {theirs}, and this is {binaries.version}. Nothing was changed. "
        f"To go on with {theirs}: set KASSA_PG_BIN={old_bin}"
        + ("" if old else f" once PostgreSQL {theirs} is installed")
        + f". To move to {binaries.major}: start Kassa that way once more, save with "
        f"`{binaries.bin}/pg_dump -Fc -f kassa.dump URL`, stop it, move {place.data} aside, start Kassa without "
        f"KASSA_PG_BIN, and load with `{binaries.bin}/pg_restore --clean --if-exists -d URL kassa.dump` before any "
        "payment; or use pg_upgrade with both sets of programs.",
        found=theirs,
        needed=binaries.major,
    )


def _prepare(place: Place, binaries: Binaries) -> list[str]:
    """A complete data directory: made beside its place and moved there at the end, so a crash leaves no half of one."""
    _give(place.account, place.base / "log", is_directory=False)
    if place.log.stat().st_size > _LOG_BYTES_MAX:
        place.log.replace(place.base / "log.1")
        _give(place.account, place.log, is_directory=False)
    for left in place.base.glob("data.unfinished*"):
        shutil.rmtree(left, ignore_errors=True)
    if place.data.exists():
        return []
    # A name of its own: what made the last one may live on for a moment after its parent was killed, and still write there.
    unfinished = place.base / f"data.unfinished-{secrets.token_hex(4)}"
    _give(place.account, unfinished, is_directory=True)
    made = run_as(
        place.account,
        [
            *(
                binaries.program("initdb"),
                "-D",
                str(unfinished),
                "-U",
                USER,
                "--no-locale",
                "-E",
                "UTF8",
                "--data-checksums",
            ),
            # The socket lies in a 0700 directory, so whoever can open it may enter; TCP needs the password.
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--no-instructions"),
        ],
    )
    if made.returncode != 0:
        raise DatabaseUnreachable(
            f"PostgreSQL could not make its files in {place.base}: {_tail(made.stderr or made.stdout)}"
        )
    with (unfinished / "postgresql.conf").open("a") as file:
        file.write("\n# Kassa's settings; ALTER SYSTEM goes before them.\ninclude 'kassa.conf'\n")
    unfinished.rename(place.data)
    _sync(place.base)
    return []


def _give(account: Account, path: Path, *, is_directory: bool) -> None:
    if is_directory:
        path.mkdir(mode=0o700, exist_ok=True)
    else:
        path.touch(mode=0o600)
    if account.switch:
        os.chown(path, account.uid, account.gid)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_private(path: Path, text: str) -> None:
    """Replace a small file at once, readable for us alone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


def _socket_directory(place: Place) -> Path:
    """`run` beside the data, or a short name in /tmp where the path of a socket would be too long or hard to quote."""
    natural = place.base / "run"
    length = len(os.fsencode(natural / ".s.PGSQL.65535.lock"))
    if length <= _SOCKET_PATH_BYTES_MAX and not set(str(natural)) & set(",'\"\\\n"):
        chosen = natural
    else:
        chosen = Path("/tmp") / f"kassa-{sha256(os.fsencode(place.data)).hexdigest()[:16]}"
    _give(place.account, chosen, is_directory=True)
    seen = chosen.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != place.account.uid or stat.S_IMODE(seen.st_mode) != 0o700:
        raise DatabaseRefused(
            f"{chosen} should be a directory of the user {place.account.name} with mode 0700; remove it."
        )
    return chosen


# Starting


def _start_server(place: Place, binaries: Binaries, settings: Mapping[str, str], notices: list[str]) -> None:
    _free_recycled_pid(place)
    token = secrets.token_hex(8)
    _write_private(place.base / "owner.json", json.dumps({"token": token}))
    port = _port(place, notices)
    for attempt in range(_PORT_TRIES_MAX + _LINGERING_TRIES_MAX):
        _write_settings(place, port, settings)
        read_from = place.log.stat().st_size
        said = _pg_ctl_start(place, binaries, token)
        if said is None:
            return
        lines = _read_from(place.log, read_from)
        if "Address already in use" in lines and attempt < _PORT_TRIES_MAX:
            port = _new_port(place)
        elif "pre-existing shared memory block" in lines and attempt < _LINGERING_TRIES_MAX:
            # The children of a killed server end by themselves as soon as they notice.
            time.sleep(0.5)
        else:
            raise DatabaseUnreachable(
                f"PostgreSQL did not start. {_fix(lines or said, place)} "
                f"Its log {place.log} ends: {_tail(lines or said)}"
            )


def _pg_ctl_start(place: Place, binaries: Binaries, token: str) -> str | None:
    """None when the server is up, else what pg_ctl says. The token in the command line marks the server as Kassa's."""
    done = run_as(
        place.account,
        [
            *(binaries.program("pg_ctl"), "start", "-w", "-s", "-t", str(_START_TIMEOUT_S), "-D", str(place.data)),
            *("-l", str(place.log), "-o", f"-c cluster_name=kassa-{token}"),
        ],
        timeout_s=_START_TIMEOUT_S + 30,
    )
    return (
        None if done.returncode == 0 else (done.stderr + done.stdout).strip() or f"pg_ctl ended with {done.returncode}"
    )


def _write_settings(place: Place, port: int, settings: Mapping[str, str]) -> None:
    where = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": str(_socket_directory(place)),
    }
    lines = [
        f"{name} = '{value.replace(chr(39), chr(39) * 2)}'"
        for name, value in {**settings, **where, "unix_socket_permissions": "0700"}.items()
    ]
    file = place.data / "kassa.conf"
    _write_private(file, "# Written by Kassa at each start.\n" + "\n".join(lines) + "\n")
    if place.account.switch:
        os.chown(file, place.account.uid, place.account.gid)


def _port(place: Place, notices: list[str]) -> int:
    """The port of this directory: the one it had, or a new one when that is taken."""
    file = place.own / "port"
    kept = int(file.read_text()) if file.exists() else None
    if kept is not None and _is_free(kept):
        return kept
    port = _new_port(place)
    if kept is not None:
        notices.append(f"Port {kept} is taken by another program, so PostgreSQL now listens on {port}.")
    return port


def _new_port(place: Place) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    _write_private(place.own / "port", f"{port}\n")
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _ready(place: Place, binaries: Binaries, notices: list[str], *, started_by_us: bool) -> Running:
    """What is known of the running server, once it has answered a query over TCP with the password."""
    lines = _wait_until_ready(place)
    is_kassas = _is_kassas(place, lines)
    if is_kassas:
        _remember_owner(place, lines)
    else:
        notices.append(
            f"The PostgreSQL on {place.data} (pid {lines.pid}) was not started by Kassa, so Kassa uses it "
            "and will not stop it."
        )
    dsn = f"postgresql://{USER}:{_password(place)}@127.0.0.1:{lines.port}/{DATABASE}"
    if not _answers(place.account, binaries, dsn):
        _make_role_and_database(place, binaries, lines)
        if not _answers(place.account, binaries, dsn):
            raise DatabaseUnreachable(
                f"PostgreSQL runs (pid {lines.pid}) but refuses Kassa's password on port {lines.port}; see {place.log}."
            )
    return Running(
        dsn=dsn,
        pid=lines.pid,
        directory=place.data,
        home=place.home,
        port=lines.port,
        user=USER,
        socket_directory=lines.socket_directory,
        account=place.account,
        binaries=binaries,
        started_by_us=started_by_us,
        is_kassas=is_kassas,
        notices=tuple(notices),
    )


def _wait_until_ready(place: Place) -> PidFile:
    """The pid file of a server that takes connections; one that is adopted may still be recovering."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        lines = _running_postmaster(place)
        if lines is None:
            break
        if lines.is_ready:
            return lines
        time.sleep(0.05)
    raise DatabaseUnreachable(
        f"PostgreSQL does not become ready. Its log {place.log} ends: {_tail(_read_from(place.log, 0))}"
    )


def _make_role_and_database(place: Place, binaries: Binaries, lines: PidFile) -> None:
    """Over the socket: Kassa's database, if there is none, and its password, which may be new."""
    known = _psql(
        place.account,
        binaries,
        lines.socket_directory,
        lines.port,
        "SELECT datname FROM pg_database;",
        database="template1",
    )
    if DATABASE not in known.split():
        _psql(
            place.account,
            binaries,
            lines.socket_directory,
            lines.port,
            f"CREATE DATABASE {DATABASE};",
            database="template1",
        )
    _psql(
        place.account,
        binaries,
        lines.socket_directory,
        lines.port,
        f"ALTER ROLE {USER} PASSWORD '{_password(place)}';",
        database="template1",
    )


def _password(place: Place) -> str:
    file = place.own / "password"
    if not file.exists():
        _write_private(file, secrets.token_urlsafe(24) + "\n")
    return file.read_text().strip()


def _answers(account: Account, binaries: Binaries, dsn: str) -> bool:
    address, _, secret_free = dsn.partition("@")
    password = address.rpartition(":")[2]
    url = f"postgresql://{USER}@{secret_free}"
    done = run_as(
        account,
        [binaries.program("psql"), "-XAtqwc", "SELECT 1", url],
        environment={"PGPASSWORD": password, "PGCONNECT_TIMEOUT": "10"},
    )
    return done.returncode == 0 and done.stdout.strip() == "1"


def _psql(account: Account, binaries: Binaries, socket_directory: Path, port: int, sql: str, *, database: str) -> str:
    command = [
        binaries.program("psql"),
        "-XAtqw",
        "-v",
        "ON_ERROR_STOP=1",
        "-h",
        str(socket_directory),
        "-p",
        str(port),
        "-U",
        USER,
        database,
    ]
    done = run_as(account, command, stdin=sql)
    if done.returncode != 0:
        raise DatabaseUnreachable(f"PostgreSQL refused: {_tail(done.stderr)}")
    return done.stdout


# Knowing a server


def _running_postmaster(place: Place) -> PidFile | None:
    """The pid file, if the process that it names is really the server on this data directory."""
    lines = _read_pid_file(place.data)
    return lines if lines is not None and _is_postmaster(lines.pid, place.data) else None


def _read_pid_file(data: Path) -> PidFile | None:
    try:
        lines = (data / "postmaster.pid").read_text().split("\n")
    except FileNotFoundError:
        return None
    if len(lines) < 6 or not lines[0].strip().isdigit():
        # The server is writing it just now, or died while it did.
        return PidFile(int(lines[0]), 0, 0, Path(), False) if lines[0].strip().isdigit() else None
    return PidFile(
        pid=int(lines[0]),
        started_at_s=int(lines[2] or 0),
        port=int(lines[3] or 0),
        socket_directory=Path(lines[4]),
        is_ready=len(lines) > 7 and lines[7].strip() == "ready",
    )


def _is_postmaster(pid: int, data: Path) -> bool:
    command = _command_line(pid)
    if not command or Path(command[0]).name not in ("postgres", "postmaster"):
        return False
    try:
        # A server's working directory is its data directory.
        return Path(f"/proc/{pid}/cwd").samefile(data)
    except PermissionError:
        # A container's root may not look; the command line that pg_ctl made names the directory too.
        return str(data) in command
    except FileNotFoundError:
        return False


def _command_line(pid: int) -> list[str]:
    """What a process was started with; empty when there is none or it is already dead and only waits to be buried."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _free_recycled_pid(place: Place) -> None:
    """After a kill -9 the pid in postmaster.pid may by now be another program's, and PostgreSQL would refuse to start.

    The file is not removed, because PostgreSQL finds in it the shared memory that the killed server's children may
    still use; only the pid is replaced by one that no process can have.
    """
    lines = _read_pid_file(place.data)
    if lines is None:
        return
    command = _command_line(lines.pid)
    if not command or Path(command[0]).name in ("postgres", "postmaster"):
        return
    # A killed server that nobody has buried yet still counts as alive for PostgreSQL, in both of its lock files.
    for file in (place.data / "postmaster.pid", lines.socket_directory / f".s.PGSQL.{lines.port}.lock"):
        if file.exists():
            _, _, rest = file.read_text().partition("\n")
            file.write_text(f"{_PID_OF_NOBODY}\n{rest}")


def _is_kassas(place: Place, lines: PidFile) -> bool:
    """Whether Kassa started this very server: by pid and start time, or by the token if we were killed before that."""
    try:
        owner = json.loads((place.base / "owner.json").read_text())
    except FileNotFoundError:
        return False
    if "pid" in owner:
        return bool(owner["pid"] == lines.pid and owner["started_at_s"] == lines.started_at_s)
    return f"cluster_name=kassa-{owner['token']}" in _command_line(lines.pid)


def _remember_owner(place: Place, lines: PidFile) -> None:
    _write_private(place.base / "owner.json", json.dumps({"pid": lines.pid, "started_at_s": lines.started_at_s}))


def _wait_for_end(place: Place, pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not _is_postmaster(pid, place.data):
            return True
        time.sleep(0.02)
    return False


# What went wrong


def _fix(lines: str, place: Place) -> str:
    """What a person can do about a server that does not start; by what its log says."""
    bad_settings = f"Correct the settings that are named, or remove {place.data}/postgresql.auto.conf."
    remedies = {
        "No space left on device": f"The disk of {place.data} is full: free some space and start again.",
        "shared memory": "Too little memory, or a killed server's processes still use this data: look with `ps`.",
        "lock file": f"Another server seems to use {place.data}: look with `ps`.",
        "Permission denied": f"The user {place.account.name} may not read or write what it needs below {place.base}.",
        "wrong ownership": f"{place.data} does not belong to the user {place.account.name}: use chown -R.",
        "invalid permissions": f"{place.data} must have mode 0700.",
        "syntax error in file": bad_settings,
        "configuration file": bad_settings,
        "invalid value for parameter": bad_settings,
        "could not locate a valid checkpoint record": "The files are damaged: restore a backup.",
    }
    return next((remedy for words, remedy in remedies.items() if words in lines), "The log says why.")


def _read_from(file: Path, offset: int) -> str:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read().decode(errors="replace")


def _tail(text: str, lines_max: int = 12) -> str:
    return "\n".join(text.strip().split("\n")[-lines_max:])
