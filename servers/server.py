"""What every server has: a directory of its own, ports that it keeps, processes, and its ways to start and to end.

    DIRECTORY/           belongs to the servers' user, 0700
      state.json         ports, password, and the processes that run; read by a later `python -m servers`
      *.log              what each process says

All of it blocks, for seconds: call it in a thread where there is an event loop.
"""

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from servers import installation
from servers.certificates import Certificates, certificates
from servers.errors import ServerFailed
from servers.process import Memory, Process, spawn

HOST = "127.0.0.1"
USER = "kassa"

_PORTS = range(15_000, 32_000)
"""Below the ports that Linux gives to clients: a client that tries to reconnect could be given the server's own port,
and would then talk to itself, and the server could not start again."""
_PORT_TRIES_MAX = 1000
_START_TIMEOUT_S = 240.0
"""Some seconds on a quiet machine; a busy one with a slow disk may need many."""
_STOP_TIMEOUT_S = 60.0
_COMMAND_TIMEOUT_S = 120.0
_POLL_S = 0.05


@dataclass(slots=True)
class State:
    """What a server's directory remembers."""

    password: str
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Role: pid, and when it began."""


class Server(ABC):
    """One real server on 127.0.0.1, with its data in `directory`; made, it does nothing before `start`.

    outlives_us: whether it stays when this process ends; otherwise it is killed then, however that end comes.
    """

    name: ClassVar[str]
    PORTS: ClassVar[tuple[str, ...]]
    """The names of the ports that it needs."""

    def __init__(self, directory: Path, *, outlives_us: bool = False) -> None:
        self.directory = directory.absolute()
        self.outlives_us = outlives_us
        self.account = installation.account()
        self._state = self._read_state()
        self._processes = {role: Process(*known) for role, known in self._state.processes.items()}

    # What a client needs

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @property
    def tls_url(self) -> str | None:
        """The same server over TLS with user and password; None when it has no such door."""
        return None

    @property
    def username(self) -> str:
        """Of the one user."""
        return USER

    @property
    def password(self) -> str:
        """Of the one user."""
        return self._state.password

    @property
    def certificates(self) -> Certificates:
        """Clients of `tls_url` trust `certificates.authority`."""
        return certificates(self.directory)

    def port(self, name: str) -> int:
        """One of PORTS."""
        return self._state.ports[name]

    # Its life

    def start(self) -> Self:
        """Start it on what is in its directory, on the ports that it had, and wait until it can be used.

        Nothing happens when it runs. Raises ServerUnavailable when it is not installed, ServerFailed when it does not
        come up.
        """
        if self.is_running:
            return self
        self.kill()
        self._prepare()
        try:
            self._launch()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """End it cleanly, last started first; nothing happens when it does not run."""
        for process in reversed(self._processes.values()):
            process.stop(_STOP_TIMEOUT_S)
        self._forget_processes()

    def kill(self) -> None:
        """SIGKILL to all of it at once, as a power cut would end it."""
        for process in self._processes.values():
            process.signal(signal.SIGKILL)
        for process in self._processes.values():
            process.kill()
        self._forget_processes()

    def freeze(self) -> None:
        """Let none of it run until `thaw`: connections stay open, and nobody answers."""
        for process in self._processes.values():
            process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after `freeze`."""
        for process in self._processes.values():
            process.signal(signal.SIGCONT)

    # What it is

    @property
    def is_running(self) -> bool:
        """Whether all of its processes live."""
        return bool(self._processes) and all(process.is_running for process in self._processes.values())

    @property
    def pids(self) -> Mapping[str, int]:
        """The leading process of each role."""
        return {role: process.pid for role, process in self._processes.items()}

    @property
    def pid(self) -> int:
        """The leader of the process group that does the work. Raises ServerFailed when it does not run."""
        if not self._processes:
            raise ServerFailed(self.name, "does not run")
        return list(self._processes.values())[-1].pid

    @property
    def log(self) -> Path:
        """What the process that does the work says."""
        return self.directory / f"{self.name}.log"

    def memory(self) -> Memory:
        """Of all its processes, now."""
        return sum((process.memory() for process in self._processes.values()), Memory(0, 0))

    def cpu_s(self) -> float:
        """CPU time that all its processes have used since they began."""
        return sum(process.cpu_s() for process in self._processes.values())

    # For the kinds of servers

    @abstractmethod
    def _launch(self) -> None:
        """Spawn the processes in order and wait until the server can be used."""

    def _spawn(
        self, role: str, command: Sequence[str | Path], environment: Mapping[str, str], *, log: Path | None = None
    ) -> Process:
        process = spawn(
            [str(part) for part in command],
            account=self.account,
            log=log or self.directory / f"{role}.log",
            directory=self.directory,
            environment=self._whole(environment),
            outlives_us=self.outlives_us,
        )
        self._processes[role] = process
        self._write_state()
        return process

    def _run(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> str:
        """What a short program says, run as the servers' user. Raises ServerFailed with its last words."""
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=self._whole(environment),
            umask=0o077,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
            user=self.account.uid if self.account.switch else None,
            group=self.account.gid if self.account.switch else None,
            extra_groups=[] if self.account.switch else None,
        )
        if done.returncode != 0:
            raise ServerFailed(self.name, f"refused: {Path(command[0]).name}", log=_end_of(done.stdout + done.stderr))
        return done.stdout.strip()

    def _whole(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": path, "LC_ALL": "C.UTF-8", "HOME": str(self.directory), **environment}

    def _await(self, what: str, is_so: Callable[[], bool]) -> None:
        """Wait until `is_so`. Raises ServerFailed when a process dies meanwhile, or after a long time."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not is_so():
            dead = [role for role, process in self._processes.items() if not process.is_running]
            if dead or time.monotonic() > deadline:
                why = f"did not come up: {' and '.join(dead)} ended" if dead else f"never came to {what}"
                raise ServerFailed(
                    self.name, why, log=_end_of(self.log.read_text(errors="replace") if self.log.exists() else "")
                )
            time.sleep(_POLL_S)

    def _await_port(self, name: str) -> None:
        self._await(f"listen on its port for {name}", lambda: can_connect(self.port(name)))

    def _write(self, name: str, text: str, *, mode: int = 0o600) -> Path:
        """A file for the servers' user."""
        file = self.directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        self._give(file.parent)
        return self._give(file)

    def _folder(self, name: str) -> Path:
        """A directory for the servers' user."""
        folder = self.directory / name
        folder.mkdir(exist_ok=True, mode=0o700)
        return self._give(folder)

    def _give(self, path: Path) -> Path:
        if self.account.switch:
            os.chown(path, self.account.uid, self.account.gid)
        return path

    # Its directory

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        self._give(self.directory)
        for file in self.certificates.files:
            self._give(file)
        ports = self._state.ports
        if set(ports) != set(self.PORTS) or not all(is_free(port) for port in ports.values()):
            self._state.ports = dict(zip(self.PORTS, free_ports(len(self.PORTS)), strict=True))

    def _read_state(self) -> State:
        try:
            return State(**json.loads((self.directory / "state.json").read_text()))
        except FileNotFoundError:
            return State(password=secrets.token_urlsafe(18))

    def _write_state(self) -> None:
        self._state.processes = {role: (process.pid, process.began) for role, process in self._processes.items()}
        self._write("state.json", json.dumps(asdict(self._state)))

    def _forget_processes(self) -> None:
        if self._processes:
            self._processes.clear()
            self._write_state()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, at random, so that two test runs rarely choose the same.

    The second below each is free too: RocketMQ's broker takes that one unasked.
    """
    found: list[int] = []
    for _ in range(_PORT_TRIES_MAX):
        port = random.choice(_PORTS)
        if not {port, port - 2, port + 2} & set(found) and is_free(port) and is_free(port - 2):
            found.append(port)
        if len(found) == count:
            return found
    raise ServerFailed("A server", f"needs {count} free ports between {_PORTS.start} and {_PORTS.stop}")


def is_free(port: int) -> bool:
    """Whether a server could listen on `port`, on every address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def can_connect(port: int) -> bool:
    """Whether somebody listens on `port`."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


def _end_of(text: str, lines_max: int = 25) -> str:
    return "\n".join(text.strip().splitlines()[-lines_max:])
