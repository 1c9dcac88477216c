"""`kassa up` as a process of its own, as a user has it: started, killed, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx

from kassa.cli.sandboxes import is_alive
from kassa.client import Kassa
from kassa.db import embedded

READY_S = 60.0
PROGRAM = [sys.executable, "-m", "kassa.cli.main"]


class Up:
    """One run of `kassa up --json`."""

    running: ClassVar[list["Up"]] = []

    def __init__(self, directory: Path, *options: str) -> None:
        self.errors = directory.parent / f"{directory.name}.stderr"
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*PROGRAM, "up", "--dir", str(directory), "--json", *(options or ("--port", "0"))],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
            )
        self.running.append(self)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        self.said: dict[str, Any] = json.loads(line)

    @property
    def sandbox(self) -> str:
        return str(self.said["sandboxes"]["wechat"]["base_url"])

    def client(self) -> Kassa:
        return Kassa(self.said["api_key"], self.said["api"])

    def pay(self, code_url: str | None) -> None:
        """The payer scans and pays."""
        answer = httpx.post(f"{self.sandbox}/_sandbox/pay", json={"code_url": code_url}, trust_env=False)
        assert answer.status_code == 200, answer.text

    def books(self) -> dict[str, Any]:
        books: dict[str, Any] = httpx.get(f"{self.sandbox}/_sandbox/books", trust_env=False).json()
        return books

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, bytes]:
        """Its exit code, and what it said after its one line."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        self.running.remove(self)
        return self.process.returncode, rest

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)
        self.running.remove(self)


def environment() -> dict[str, str]:
    """Ours, without settings of Kassa, which would count for the program too."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KASSA_") or "_PG_" in name}


def kassa(*arguments: str, expect: int = 0, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    done = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=120, env=environment(), input=given, check=False
    )
    assert done.returncode == expect, (done.returncode, done.stdout, done.stderr)
    return done


def sandbox_pid(directory: Path) -> int:
    pid: int = json.loads((directory / "sandboxes" / "wechat.json").read_text())["pid"]
    return pid


@contextmanager
def set_up() -> Iterator[Path]:
    """A directory for `kassa up`; whatever still runs on it at the end is ended."""
    with embedded.temporary_directory("kassa-up-") as parent:
        directory = parent / "house"
        try:
            yield directory
        finally:
            for left in list(Up.running):
                left.kill()
            record = directory / "sandboxes" / "wechat.json"
            if record.exists() and is_alive(sandbox_pid(directory)):
                os.kill(sandbox_pid(directory), signal.SIGKILL)
            running = embedded.find(directory)
            if running is not None:
                embedded.stop(running)


def wait_until(claim: Any, *, timeout_s: float = 60.0) -> Any:
    """The first true answer of `claim()`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := claim()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.05)
    return answer
