"""The production layout: APIs and workers as processes of their own on one database, each killed on its own."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import tally
from chaos.house import PATIENCE_S, TESTS, House


class Part:
    """One `kassa serve` or `kassa worker`."""

    def __init__(self, house: House, name: str, *arguments: str, environment: dict[str, str]) -> None:
        self.name = name
        self._plan = house.directory / f"crash-plan-{name}"
        self._log = house.directory / f"log-{name}"
        self._command = [sys.executable, "-m", "chaos.node", *arguments, "--dir", str(house.directory)]
        self._environment = os.environ | environment | {"PYTHONPATH": str(TESTS), "KASSA_CRASH_FILE": str(self._plan)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it says that it works."""
        ready = self._ready() + 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        deadline = time.monotonic() + PATIENCE_S
        while self._ready() < ready:
            assert self.is_alive and time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)

    def _ready(self) -> int:
        """How often it has said so."""
        return self.log().count("API is ready at") + self.log().count("working: ")

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def crash_at(self, plan: str) -> None:
        """As `House.crash_at`."""
        fresh = self._plan.with_suffix(".new")
        fresh.write_text(plan)
        fresh.rename(self._plan)

    def confirmed(self) -> list[list[str]]:
        """What brokers have confirmed to it, by name, each time."""
        return [line.split() for line in self._plan.with_suffix(".confirmed").read_text().splitlines()]

    def kill(self) -> None:
        """kill -9."""
        tally.count("kills")
        self.end()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_S)


class Parts(House):
    """What `kassa up` has set up, run by two APIs and two workers. The provider calls the first API."""

    def __init__(self, directory: Path, database_url: str) -> None:
        super().__init__(directory, database_url)
        ports = _free_ports(2)
        self._urls = [f"http://127.0.0.1:{port}" for port in ports]
        environment = {
            "KASSA_DATABASE_URL": database_url,
            "KASSA_PUBLIC_URL": self._urls[0],
            "KASSA_WEBHOOK_ALLOW_PRIVATE": "true",
        }
        self.apis = [
            Part(self, f"api{number}", "serve", "--port", str(port), environment=environment)
            for number, port in enumerate(ports)
        ]
        self.workers = [Part(self, f"worker{number}", "worker", environment=environment) for number in range(2)]

    @property
    def parts(self) -> list[Part]:
        return [*self.apis, *self.workers]

    def start(self) -> None:
        super().start()
        self._end()
        for part in self.parts:
            part.start()

    def stop(self) -> None:
        for part in self.parts:
            part.end()
        super().stop()

    @property
    def api(self) -> str:
        return random.choice(self._urls)

    def log(self) -> str:
        return super().log() + "".join(f"\n--- {part.name}\n{part.log()[-1500:]}" for part in self.parts)


def _free_ports(count: int) -> list[int]:
    with suppress(OSError):
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        return ports
    raise AssertionError("no port is free")
