"""What processes take of the machine, read from Linux's /proc."""

import os
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def pss_bytes(pid: int) -> int:
    """Memory of a process; what it shares with others counts in equal parts, so that sums are true."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used, in its own code and in the kernel."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def family(pid: int) -> list[int]:
    """A process and all its descendants that live."""
    parents = {}
    for place in PROC.iterdir():
        if place.name.isdigit():
            try:
                parents[int(place.name)] = int(_stat(int(place.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def command(pid: int) -> str:
    """Its command line, on one line."""
    return (PROC / str(pid) / "cmdline").read_text().replace("\0", " ").strip()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may hold anything."""
    return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
