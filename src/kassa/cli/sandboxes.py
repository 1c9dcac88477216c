"""Sandboxes as processes of their own: started, found again after a crash, watched, stopped."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec

from kassa.cli.directory import write_private

SANDBOXES = {"wechat": "kassa.channels.sandbox.wechat"}
"""The provider's name and the module that is its process."""
START_TIMEOUT_S = 30.0
"""Three RSA keys are made at first start; that takes a slow machine some seconds."""
STOP_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 2.0

Credentials = dict[str, str]


class Process(msgspec.Struct, frozen=True):
    """Which process a sandbox is. `started` tells it from a later one with the same number; None where it cannot."""

    pid: int
    started: str | None
    credentials: Credentials


class Sandbox:
    """One provider's sandbox in DIR/sandboxes/NAME."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._home = directory / "sandboxes" / name
        self._record = directory / "sandboxes" / f"{name}.json"
        self._log = directory / "sandboxes" / f"{name}.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._process: Process | None = None

    @property
    def credentials(self) -> Credentials:
        """What a merchant needs to use it. Only after `ensure`."""
        assert self._process is not None
        return self._process.credentials

    async def ensure(self) -> bool:
        """Runs afterwards: found and adopted, or started. True when it was started."""
        if self._process is None:
            self._process = await self._adopt()
        if self._process is not None and self._is_alive(self._process):
            return False
        self._process = await asyncio.to_thread(self._start)
        return True

    def stop(self) -> None:
        """Ends it and waits for its end; books and keys stay."""
        process, self._process = self._process, None
        if process is not None and self._is_alive(process):
            self._end(process)

    def _end(self, process: Process) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.kill(process.pid, number)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while time.monotonic() < deadline:
                if not self._is_alive(process):
                    self._record.unlink(missing_ok=True)
                    return
                time.sleep(0.02)

    async def _adopt(self) -> Process | None:
        """The process of an earlier start, if it lives, is the same one, and still says who it is."""
        try:
            process = msgspec.json.decode(self._record.read_bytes(), type=Process)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        if not self._is_alive(process):
            return None
        credentials = await _asked(process)
        if credentials is None or credentials.get("mchid") != process.credentials.get("mchid"):
            # It lives and cannot be used, and it holds the books.
            await asyncio.to_thread(self._end, process)
            return None
        # Its keys may have been rotated since.
        adopted = msgspec.structs.replace(process, credentials=credentials)
        self._keep(adopted)
        return adopted

    def _start(self) -> Process:
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", SANDBOXES[self.name], "--dir", str(self._home), "--port", "0", "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                # Its own session: Ctrl-C in the terminal is for us, and we stop it in order.
                start_new_session=True,
            )
        # Written before it is ready: should we be killed while it makes its keys, the next start finds it.
        self._keep(Process(self._child.pid, _started(self._child.pid), {}))
        line = _first_line(self._child)
        if line is None:
            self._child.kill()
            self._child.wait()
            raise click.ClickException(f"The {self.name} sandbox does not start; see {self._log}.")
        process = Process(self._child.pid, _started(self._child.pid), json.loads(line))
        self._keep(process)
        return process

    def _keep(self, process: Process) -> None:
        write_private(self._record, msgspec.json.encode(process))

    def _is_alive(self, process: Process) -> bool:
        if self._child is not None and self._child.pid == process.pid:
            return self._child.poll() is None
        return is_alive(process.pid) and _started(process.pid) == process.started


async def _asked(process: Process) -> Credentials | None:
    """What a running sandbox says of itself; None when it does not answer, or was never ready."""
    address = process.credentials.get("base_url")
    if address is None:
        return None
    try:
        async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S, trust_env=False) as http:
            answer = await http.get(f"{address}/_sandbox")
        return msgspec.json.decode(answer.content, type=Credentials)
    except (httpx.HTTPError, msgspec.DecodeError):
        return None


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    fields = _stat(pid)
    return fields is None or fields[0] not in "ZX"


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None where there is no /proc."""
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; the name before it may hold anything."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _first_line(child: "subprocess.Popen[bytes]") -> bytes | None:
    """What it prints when it is ready; None when it ends before, or takes too long."""
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    text = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        part: Any = child.stdout.read()
        text += part or b""
        if b"\n" in text:
            child.stdout.close()
            return text.partition(b"\n")[0]
        if child.poll() is not None:
            return None
        time.sleep(0.02)
    return None
