"""Starts one program in a process group of its own, tells its pid, and ends it when whoever asked is gone.

    python -I -S guardian.py guard|leave UID|- GID|- COMMAND…

Run as a program, not imported. The end of standard input is the end of whoever asked, also when that was a SIGKILL: then
the program and all that it started are killed. If the guardian itself is killed, the kernel kills the program. With
`leave` the program stays, and the guardian ends at once.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# Source: linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Print the pid on standard output; everything that the program says goes to standard error."""
    manner, uid, gid, *command = sys.argv[1:]
    is_guarded = manner == "guard"
    is_other_user = uid != "-"
    if is_guarded:
        # What the program leaves behind becomes a child of ours.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    program = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        umask=0o077,
        user=int(uid) if is_other_user else None,
        group=int(gid) if is_other_user else None,
        extra_groups=[] if is_other_user else None,
        # It runs after the change of user, which would clear it; and this program has one thread.
        preexec_fn=_die_with_the_guardian if is_guarded else None,
    )
    os.write(1, b"%d\n" % program.pid)
    os.close(1)
    if is_guarded:
        _watch(program.pid)
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        _bury_all()
    os._exit(0)


def _watch(program: int) -> None:
    """Bury what dies among our children, until it is the program or until whoever asked is gone."""
    heard, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        # Before the wait, because one may have died before we listened.
        while (dead := _dead_child()) is not None:
            if dead == program:
                return
        ready, _, _ = select.select([0, heard], [], [])
        if 0 in ready:
            return
        os.read(heard, 1024)


def _dead_child() -> int | None:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] or None
    except ChildProcessError:
        return None


def _bury_all() -> None:
    """Kill our children, and theirs as they become ours, until there is none."""
    while children := _children():
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


def _children() -> list[int]:
    """Also the dead ones that wait for us, which can still be killed without an error."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == os.getpid():
                    found.append(int(entry.name))
    return found


def _die_with_the_guardian() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
