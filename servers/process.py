"""One server process with what belongs to it: started, looked at, stopped, killed. Linux, through /proc. All of it blocks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kassa.db.account import Account

# Read when gRPC is imported (servers/rocketmq.py, later than this file): it must leave alone the children that are started here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_GUARDIAN = Path(__file__).with_name("guardian.py")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_POLL_S = 0.02
_KILLS_MAX = 60
"""A process in the middle of a write to a slow disk dies when that is done."""


class Memory(NamedTuple):
    """What the processes of a server take together."""

    rss_bytes: int
    pss_bytes: int
    """Pages that several processes share are counted once, in parts."""

    def __add__(self, other: object) -> "Memory":
        if not isinstance(other, Memory):
            return NotImplemented
        return Memory(self.rss_bytes + other.rss_bytes, self.pss_bytes + other.pss_bytes)


class _Stat(NamedTuple):
    """The fields of /proc/PID/stat that we use. Source: proc(5)."""

    state: str
    parent: int
    group: int
    cpu_ticks: int
    """Its own and its buried children's, in user and system mode."""
    began: int


@dataclass(slots=True)
class Process:
    """A process that leads a group of its own, known by its pid and by when it began: pids are used again."""

    pid: int
    began: int
    """Clock ticks since the machine started."""
    _guardian: subprocess.Popen[bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def is_running(self) -> bool:
        """Whether it lives; a dead process that nobody has buried yet does not."""
        stat = _stat(self.pid)
        return stat is not None and stat.began == self.began and stat.state not in "ZX"

    def signal(self, number: int) -> None:
        """Send a signal to the whole group; nothing happens when it is gone."""
        if self.is_running:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def ended(self, timeout_s: float) -> bool:
        """Wait for the end of the whole group; False when it still lives after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.is_running or self._members():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        self._dismiss_guardian()
        return True

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL to what is left after `timeout_s`."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if not self.ended(timeout_s):
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group, and wait until the kernel is done with it."""
        # Again, because one may have been started between the look and the kill.
        for _ in range(_KILLS_MAX):
            for pid in self._members():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.ended(timeout_s=1):
                return

    def memory(self) -> Memory:
        """Of the whole group, now."""
        return sum((_memory(pid) for pid in self._members()), Memory(0, 0))

    def cpu_s(self) -> float:
        """CPU time that the whole group has used since it began."""
        return sum(stat.cpu_ticks for stat in self._members().values()) / _TICKS_PER_S

    def _members(self) -> dict[int, _Stat]:
        """The living: of the group, and what they started in groups of its own."""
        living = _living()
        found = {pid: stat for pid, stat in living.items() if stat.group == self.pid and stat.began >= self.began}
        while more := {pid: stat for pid, stat in living.items() if stat.parent in found and pid not in found}:
            found |= more
        return found

    def _dismiss_guardian(self) -> None:
        if self._guardian is not None:
            self._guardian.communicate()
            self._guardian = None


def spawn(
    command: Sequence[str],
    *,
    account: Account,
    log: Path,
    directory: Path,
    environment: Mapping[str, str],
    outlives_us: bool,
) -> Process:
    """Start a program as `account`, in a group of its own, with no other environment than what is given.

    log: what it says is added there.
    outlives_us: when False it is killed as soon as this process ends, however it ends.
    Raises FileNotFoundError when there is no such program.
    """
    who = [str(account.uid), str(account.gid)] if account.switch else ["-", "-"]
    with log.open("ab") as said:
        guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARDIAN), "leave" if outlives_us else "guard", *who, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            cwd=directory,
            env=dict(environment),
            start_new_session=True,
        )
    assert guardian.stdout is not None
    line = guardian.stdout.readline()
    if not line:
        guardian.communicate()
        raise FileNotFoundError(f"{command[0]} could not be started; see {log}")
    pid = int(line)
    stat = _stat(pid)
    process = Process(pid, stat.began if stat else 0, guardian)
    if outlives_us:
        process._dismiss_guardian()
    return process


def _living() -> dict[int, _Stat]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    stats = {pid: stat for pid in pids if (stat := _stat(pid)) is not None}
    return {pid: stat for pid, stat in stats.items() if stat.state not in "ZX"}


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold spaces and parentheses itself.
    fields = text.rpartition(")")[2].split()
    return _Stat(
        state=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        cpu_ticks=sum(int(value) for value in fields[11:15]),
        began=int(fields[19]),
    )


def _memory(pid: int) -> Memory:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return Memory(0, 0)
    kilobytes = {words[0]: int(words[1]) for words in (line.split() for line in lines[1:])}
    return Memory(kilobytes["Rss:"] * 1024, kilobytes["Pss:"] * 1024)
