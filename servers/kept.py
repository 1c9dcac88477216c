"""The servers that `python -m servers start` keeps: which kinds, and in which directories."""

import json
from collections.abc import Mapping
from pathlib import Path

from servers import installation
from servers.kafka import Kafka
from servers.rabbitmq import RabbitMQ
from servers.rocketmq import RocketMQ
from servers.server import Server

KINDS: Mapping[str, type[Server]] = {kind.name: kind for kind in (RabbitMQ, Kafka, RocketMQ)}
"""Every kind of server by its name."""


def running() -> list[Server]:
    """Those that live now."""
    return [server for server in kept() if server.is_running]


def kept() -> list[Server]:
    """Those that were started and not stopped; one may have died since."""
    return [KINDS[name](Path(directory), outlives_us=True) for name, directory in _directories().items()]


def keep(server: Server) -> None:
    """Remember a server that was started."""
    _write(_directories() | {server.name: str(server.directory)})


def forget(server: Server) -> None:
    """Forget one that was stopped."""
    _write({name: directory for name, directory in _directories().items() if name != server.name})


def _directories() -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(_file().read_text())
    except FileNotFoundError:
        return {}
    return found


def _write(directories: Mapping[str, str]) -> None:
    _file().parent.mkdir(parents=True, exist_ok=True)
    _file().write_text(json.dumps(directories, indent=2) + "\n")


def _file() -> Path:
    return installation.home() / "running.json"
