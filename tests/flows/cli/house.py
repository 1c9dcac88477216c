"""`kassa up` as a process of its own, as a user has it: started, killed, started again."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import httpx

from kassa.cli.main import main
from kassa.cli.sandboxes import is_alive
from kassa.client import Kassa
from kassa.client.objects import Payment
from kassa.db import embedded

ANSWER_S = 60.0
"""For one answer of a process, and for its end: on a busy machine everything may stand still for many seconds."""
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
                # A channel that is slow on a busy machine is waited for as long as can be.
                env=environment() | {"KASSA_CHANNEL_WAIT_S": "30"},
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
        return Kassa(self.said["api_key"], self.said["api"], timeout_s=ANSWER_S)

    def get(self, path: str, key: str) -> httpx.Response:
        """One look over HTTP."""
        given = {"Authorization": f"Bearer {key}"}
        return httpx.get(self.said["api"] + path, headers=given, trust_env=False, timeout=ANSWER_S)

    def code_url(self, payment_id: str) -> str:
        """What the payer scans, once the channel has said it: the POST's answer need not have it yet."""

        def said() -> str | None:
            action = client.payments.get(payment_id).next_action
            return action.code_url if action else None

        with self.client() as client:
            return str(wait_until(said))

    def waiting(self, order_id: str, amount: int = 1, **fields: Any) -> Payment:
        """A payment that waits for its payer."""
        with self.client() as client:
            made = client.payments.create(
                order_id=order_id, amount=amount, currency="CNY", channel="wechat", method="native", **fields
            )
        self.code_url(made.id)
        return made

    def pay(self, payment: Payment) -> None:
        """The payer scans and pays."""
        told = {"code_url": self.code_url(payment.id)}
        answer = httpx.post(f"{self.sandbox}/_sandbox/pay", json=told, trust_env=False, timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, bytes]:
        """Its exit code, and what it said after its one line."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=ANSWER_S)
        self.running.remove(self)
        return self.process.returncode, rest

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=ANSWER_S)
        self.running.remove(self)


def environment() -> dict[str, str]:
    """Ours, without settings of Kassa, which would count for the program too."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KASSA_") or "_PG_" in name}


def kassa(*arguments: str, expect: int = 0, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """One command, to its end, in this process: a process of its own takes seconds to start."""
    said, told = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(), clear=True),
        patch("sys.stdin", io.StringIO(given)),
        redirect_stdout(said),
        redirect_stderr(told),
        _logging_kept(),
    ):
        code = _ended(list(arguments))
    done = subprocess.CompletedProcess(arguments, code, said.getvalue(), told.getvalue())
    assert done.returncode == expect, (done.returncode, done.stdout, done.stderr)
    return done


def _ended(arguments: list[str]) -> Any:
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0


@contextmanager
def _logging_kept() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def kassa_process(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """One command, to its end, as a process of its own."""
    done = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=3 * ANSWER_S, env=environment(), check=False
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


def wait_until(claim: Any, *, timeout_s: float = 120.0) -> Any:
    """The first true answer of `claim()`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := claim()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.05)
    return answer
