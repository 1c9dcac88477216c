"""Whom PostgreSQL runs as. It refuses to run with uid 0, so for root it runs as an unprivileged user.

Nobody is created and no permission of an existing directory is changed: what that user cannot reach is put elsewhere.
"""

import os
import pwd
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kassa.errors import DatabaseRefused

_COMMAND_TIMEOUT_S = 120
"""initdb needs a second; a slow disk may need many."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine. `switch` is true when we are root and have to become this user."""

    name: str
    uid: int
    gid: int
    switch: bool


def present_account() -> Account:
    """The user that runs this program."""
    return Account(name=_name_of(os.getuid()), uid=os.getuid(), gid=os.getgid(), switch=False)


def server_account(data_owner: int | None) -> Account:
    """Who runs the server: ourselves; for root the owner of the data, else KASSA_PG_USER, `postgres` or `nobody`.

    data_owner: uid of an existing data directory, None when there is none yet.
    Raises DatabaseRefused when the data belongs to root or to somebody we cannot become.
    """
    if os.getuid() != 0:
        _refuse_foreign(data_owner)
        return present_account()
    if data_owner is not None:
        return _account_of(data_owner)
    wished = os.environ.get("KASSA_PG_USER")
    for name in [wished] if wished else ["postgres", "nobody"]:
        entry = _entry(name)
        if entry is not None and entry.pw_uid != 0:
            return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid, switch=True)
    raise DatabaseRefused(
        f"PostgreSQL does not run as root, and there is no unprivileged user named {wished or 'postgres or nobody'}; "
        "name one in KASSA_PG_USER, or run Kassa as an ordinary user."
    )


def run_as(
    account: Account,
    command: Sequence[str],
    *,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
    timeout_s: float = _COMMAND_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run a command as `account`, in `/`, without our PG… variables; its output as text, whatever the exit code."""
    return subprocess.run(
        list(command),
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        cwd="/",
        env=_environment() | dict(environment or {}),
        umask=0o077,
        timeout=timeout_s,
        check=False,
        user=account.uid if account.switch else None,
        group=account.gid if account.switch else None,
        extra_groups=[] if account.switch else None,
    )


def can_enter(account: Account, directory: Path) -> bool:
    """Whether `account` can reach what lies in `directory`. Asked of the kernel, which knows about access lists too."""
    return run_as(account, ["/bin/sh", "-c", 'cd -- "$1" 2>/dev/null', "sh", str(directory)]).returncode == 0


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C"}


def _refuse_foreign(data_owner: int | None) -> None:
    if data_owner is None or data_owner == os.getuid():
        return
    raise DatabaseRefused(
        f"The database files belong to the user {_name_of(data_owner)}, and this is {_name_of(os.getuid())}; "
        "run Kassa as that user or as root, or give it another directory."
    )


def _account_of(uid: int) -> Account:
    if uid == 0:
        raise DatabaseRefused(
            "The database files belong to root, as whom PostgreSQL does not run; give them to another user (chown -R)."
        )
    try:
        gid = pwd.getpwuid(uid).pw_gid
    except KeyError:
        # A container may run with a user id that has no entry; the id alone is enough to run a server.
        gid = uid
    return Account(name=_name_of(uid), uid=uid, gid=gid, switch=True)


def _entry(name: str | None) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name or "")
    except KeyError:
        return None


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
