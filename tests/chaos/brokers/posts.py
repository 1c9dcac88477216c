"""The broker of a chain, as something that can be killed, stopped and put behind a line: one class for each kind."""

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import tally
from brokers.kafka_house import OwnKafka
from chaos.node import kill_family
from kassa.db import embedded
from kassa.ids import new_id
from servers import RabbitMQ, RocketMQ, Server
from servers.server import free_ports

TESTS = Path(__file__).parent.parent.parent
STARTS_MAX = 5


class Post(ABC):
    """A broker for one chain. All of it blocks, apart from what is `async`."""

    scheme: str
    settles_s = 0.0
    """It must not be killed sooner after its queues were made."""
    url: str
    """For Kassa and for whoever else has part in the chain; through the line, if there is one."""

    @abstractmethod
    def start(self) -> None:
        """Nothing happens when it runs."""

    @abstractmethod
    def stop(self) -> None:
        """Cleanly."""

    def kill(self) -> None:
        """kill -9."""
        tally.count(f"kills of {self.scheme}")
        self.end()

    @abstractmethod
    def end(self) -> None:
        """At once, without being counted."""


class ServerPost(Post):
    """A server of a process of its own, which several chains use one after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def end(self) -> None:
        self.server.kill()


class Rabbit(ServerPost):
    """RabbitMQ, with a virtual host for each chain."""

    scheme = "amqp"
    settles_s = 2.5
    server: RabbitMQ

    def __init__(self, server: RabbitMQ) -> None:
        super().__init__(server)
        self.url = server.virtual_host(f"chain-{new_id()[-12:]}")

    @property
    def port(self) -> int:
        return self.server.port("amqp")


class KafkaPost(ServerPost):
    """Kafka."""

    scheme = "kafka"
    server: OwnKafka

    def __init__(self, server: OwnKafka) -> None:
        super().__init__(server)
        self.url = server.url


class Rocket(ServerPost):
    """RocketMQ."""

    scheme = "rocketmq"
    settles_s = 6.0
    """It writes down every five seconds where groups begin; without that a new one gets what the topic has of other chains."""
    server: RocketMQ

    def __init__(self, server: RocketMQ) -> None:
        super().__init__(server)
        self.url = server.url

    @property
    def port(self) -> int:
        return self.server.port("grpc")


class HubPost(Post):
    """ZeroMQ's hub in a process of its own; Kassa's database is its memory."""

    scheme = "zeromq"

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        # No port that the system gives to clients: one that connects again could get it, and be connected to itself.
        (self.port,) = free_ports(1)
        self.url = f"zeromq://127.0.0.1:{self.port}?role=peer"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Again and again, as a process's supervisor does: it gives up when it is not answered in time."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "brokers.zeromq_hub", self._database_url]
        address = f"zeromq://127.0.0.1:{self.port}?role=hub&lease_s=2"
        for _ in range(STARTS_MAX):
            self._process = subprocess.Popen(
                [*command, address], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)}
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline().startswith("zeromq://"):
                return
            self._process.communicate()
        raise AssertionError(f"no hub in {STARTS_MAX} starts")

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.communicate()

    def end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()


class Database(Post):
    """PostgreSQL, which is Kassa's database too: who kills the one kills the other."""

    scheme = "postgres"
    url = "postgres"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.running = embedded.start(directory, settings={"max_connections": "200"})

    def start(self) -> None:
        if embedded.find(self._directory) is None:
            self.running = embedded.start(self._directory, settings={"max_connections": "200"})

    def stop(self) -> None:
        embedded.stop(self.running)

    def end(self) -> None:
        if (found := embedded.find(self._directory)) is not None:
            kill_family(found.pid)


def with_port(url: str, port: int) -> str:
    """The same URL at another port of this machine."""
    parts = urlsplit(url)
    account, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{account}{at}127.0.0.1:{port}"))
