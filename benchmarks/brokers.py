"""The brokers that benchmarks can have on this machine, by name: real servers of their own, started when they are needed."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kassa.messaging.registry import REGISTRY
from servers import KINDS, ServerUnavailable, install

SERVERS = {"amqp": "rabbitmq", "kafka": "kafka", "rocketmq": "rocketmq"}
"""Scheme to server; the other schemes need none."""


def names() -> list[str]:
    """What a benchmark of brokers goes through: every binder but the one that is inside a process, each by its first scheme."""
    first: dict[str, str] = {}
    for scheme, module in REGISTRY.items():
        first.setdefault(module, scheme)
    return [scheme for scheme in first.values() if scheme != "memory"]


@contextmanager
def broker(scheme: str, folder: Path) -> Iterator[str | None]:
    """Its URL while it runs; None, and why is said, when this machine cannot have it."""
    kind = SERVERS.get(scheme)
    if scheme == "zeromq":
        yield f"zeromq://127.0.0.1:{_free_port()}"
    elif kind is None:
        yield scheme
    else:
        try:
            install(kind)
            server = KINDS[kind](folder / kind).start()
        except ServerUnavailable as error:
            print(f"{kind} is not measured: {error}")
            yield None
            return
        try:
            yield server.url
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
