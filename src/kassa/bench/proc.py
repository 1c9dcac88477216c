"""What processes of this machine take, and which of them listens on a port. Linux, through /proc; elsewhere it knows nothing."""

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
_LISTENS = "0A"
"""State of a socket. Source: linux/include/net/tcp_states.h."""
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def pss_bytes(pid: int) -> int | None:
    """Memory of a process; what it shares with others counts in equal parts, so that sums are true. None: not to be known."""
    with suppress(*_GONE):
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


def sum_pss_bytes(pids: list[int]) -> int | None:
    """Of all that can be looked at; None when none can."""
    known = [size for pid in pids if (size := pss_bytes(pid)) is not None]
    return sum(known) if known else None


def family(pids: list[int]) -> list[int]:
    """Processes and all their descendants that live."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with suppress(*_GONE):
                parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found = list(dict.fromkeys(pids))
    for one in found:
        found += [child for child in children.get(one, []) if child not in found]
    return found


def is_here(host: str) -> bool:
    """Whether a host name is this machine, over loopback."""
    with suppress(OSError, ValueError):
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    return False


def listeners(port: int) -> list[int]:
    """The processes that listen on a port, as far as we may look."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    found = []
    for entry in PROC.iterdir() if sockets else ():
        if entry.name.isdigit():
            with suppress(*_GONE):
                if any(str(link.readlink()) in sockets for link in _links(entry)):
                    found.append(int(entry.name))
    return found


def _links(process: Path) -> list[Path]:
    return list((process / "fd").iterdir())


def _inodes(port: int) -> set[str]:
    found: set[str] = set()
    for name in ("tcp", "tcp6"):
        with suppress(*_GONE):
            for line in (PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def machine() -> dict[str, str | int]:
    """What figures depend on."""
    import platform

    return {
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": os.cpu_count() or 0,
        "memory_bytes": int((_line("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _line(file: str, name: str) -> str:
    """The value of `name : value` in a file of /proc; empty where there is none."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
