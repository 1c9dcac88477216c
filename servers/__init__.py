"""Real servers for tests and benchmarks: RabbitMQ, Kafka and RocketMQ, installed, started and stopped by the project.

    rabbitmq = RabbitMQ(directory).start()
    …  rabbitmq.url  …
    rabbitmq.stop()

The directory must be one that the servers' user can reach: `kassa.db.embedded.temporary_directory` makes such. Nothing
here is part of Kassa; tests, benchmarks and `python -m servers` use it.
"""

from servers.errors import ServerFailed, ServerUnavailable
from servers.installation import install, is_installed
from servers.kafka import Kafka
from servers.kept import KINDS, running
from servers.process import Memory
from servers.rabbitmq import RabbitMQ
from servers.rocketmq import RocketMQ
from servers.server import Server

__all__ = [
    "KINDS",
    "Kafka",
    "Memory",
    "RabbitMQ",
    "RocketMQ",
    "Server",
    "ServerFailed",
    "ServerUnavailable",
    "install",
    "is_installed",
    "running",
]
