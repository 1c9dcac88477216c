"""What is started ends: with a signal, with whoever started it, and with its guardian."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kassa.db.account import present_account
from servers.process import Process, spawn

_WAIT_S = 60
_FAMILY = ["/bin/sh", "-c", "sleep 1001 & setsid sleep 1002 & sleep 1003"]
"""A shell with a child in its group, one in a group of its own, and one that it waits for."""
_OWNER = """
import sys, time
from pathlib import Path
from servers.process import spawn
from kassa.db.account import present_account
place = Path(sys.argv[1])
process = spawn(sys.argv[3:], account=present_account(), log=place / "log", directory=place,
                environment={"PATH": "/usr/bin:/bin"}, outlives_us=sys.argv[2] == "stay")
print(process.pid, process.began, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Process]:
    process = _spawn(tmp_path, _FAMILY)
    _wait_until(lambda: len(process._members()) == 4)
    yield process
    process.kill()


def test_kill_ends_every_descendant(family: Process) -> None:
    members = family._members()

    family.kill()

    assert not [pid for pid in members if _lives(pid)]


def test_stop_sends_sigterm_first(tmp_path: Path) -> None:
    process = _spawn(
        tmp_path, ["/bin/sh", "-c", "trap 'echo told; exit 0' TERM; echo ready; while :; do sleep 0.01; done"]
    )
    _wait_until(lambda: "ready" in (tmp_path / "log").read_text())

    process.stop(timeout_s=_WAIT_S)

    assert "told" in (tmp_path / "log").read_text()
    assert not process.is_running


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    process = _spawn(tmp_path, ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"])
    _wait_until(lambda: "ready" in (tmp_path / "log").read_text())

    process.stop(timeout_s=0.1)

    assert not process.is_running


def test_a_guarded_program_dies_with_its_killed_owner(tmp_path: Path) -> None:
    owner, process = _owned(tmp_path, "die")
    _wait_until(lambda: len(process._members()) == 4)
    members = process._members()

    owner.kill()
    owner.communicate()

    _wait_until(lambda: not any(_lives(pid) for pid in members))
    assert not process.is_running


def test_a_program_that_may_stay_outlives_its_owner(tmp_path: Path) -> None:
    owner, process = _owned(tmp_path, "stay")
    try:
        owner.kill()
        owner.communicate()

        assert process.is_running
    finally:
        process.kill()


def test_a_program_dies_with_its_guardian(tmp_path: Path) -> None:
    process = _spawn(tmp_path, ["sleep", "1000"])
    assert process._guardian is not None

    process._guardian.kill()

    assert process.ended(timeout_s=_WAIT_S)


def test_a_pid_that_was_given_again_is_another_process() -> None:
    other = Process(os.getpid(), began=1)

    assert not other.is_running


def test_a_program_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        _spawn(tmp_path, ["/no-such-program"])


def test_memory_and_cpu_are_those_of_the_family(tmp_path: Path) -> None:
    process = _spawn(tmp_path, [sys.executable, "-c", "x = bytearray(50_000_000)\nwhile True: pass"])
    try:
        _wait_until(lambda: process.cpu_s() > 0.1 and process.memory().pss_bytes >= 50_000_000)

        assert 50_000_000 < process.memory().pss_bytes <= process.memory().rss_bytes < 100_000_000
    finally:
        process.kill()


def _spawn(place: Path, command: list[str]) -> Process:
    return spawn(
        command,
        account=present_account(),
        log=place / "log",
        directory=place,
        environment={"PATH": "/usr/bin:/bin"},
        outlives_us=False,
    )


def _owned(place: Path, manner: str) -> tuple[subprocess.Popen[str], Process]:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(place), manner, *_FAMILY],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    pid, began = owner.stdout.readline().split()
    return owner, Process(int(pid), int(began))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
