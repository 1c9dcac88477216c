"""An account of Kafka that has rights to single names: its topic and its own group, and no group beside it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

# Its types do not tell that this module has what it takes from the client's core.
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from structlog.testing import capture_logs

from brokers.kafka_house import WAIT_S, OwnKafka, new_topic, open_transport, packet
from brokers.streams import see
from kassa.db import embedded
from kassa.errors import BrokerUnreachable, SettingInvalid
from kassa.messaging.binders.kafka import KafkaTransport, group_id
from kassa.messaging.model import Confirmed, Failed, Packet
from kassa.messaging.topology import Topic

pytestmark = pytest.mark.needs("kafka")

DEADLINE_S = 10.0
PATIENCE_S = 3 * WAIT_S
"""Kafka's client asks for a group that it may not use until its time is over, and nothing is sent before that."""


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnKafka]:
    """One whose users have only the rights that somebody gives."""
    with embedded.temporary_directory("kassa-kafka-") as directory:
        server = OwnKafka(directory / "kafka")
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
async def transport(own_server: OwnKafka) -> AsyncIterator[KafkaTransport]:
    async with open_transport(own_server.safe_url) as opened:
        yield opened


def allow(server: OwnKafka, topic: Topic, *groups: str) -> None:
    """All that Kassa needs of a topic, and of these of its groups, each by its full name."""
    rights = [(ResourceType.TOPIC, topic.name, one) for one in ("CREATE", "WRITE", "READ", "DESCRIBE")]
    rights += [(ResourceType.GROUP, group_id(topic.name, group), "READ") for group in groups]
    bindings = [
        AclBinding(
            kind, name, ResourcePatternType.LITERAL, f"User:{server.username}", "*", AclOperation[operation],
            AclPermissionType.ALLOW,
        )
        for kind, name, operation in rights
    ]  # fmt: skip
    admin = AdminClient({"bootstrap.servers": server.bootstrap})
    for future in admin.create_acls(bindings).values():
        future.result()


async def delete(server: OwnKafka, topic: Topic) -> None:
    """As a stranger does."""
    admin = AdminClient({"bootstrap.servers": server.bootstrap})
    for future in admin.delete_topics([topic.name]).values():
        await asyncio.wrap_future(future)


async def insist(transport: KafkaTransport, topic: Topic, *packets: Packet) -> None:
    """As a relay does: what failed and is retryable is sent again; nothing may be refused for good."""
    left: Sequence[Packet] = packets
    async with asyncio.timeout(PATIENCE_S):
        while left:
            receipts = await transport.send(topic, left, deadline_s=DEADLINE_S, must_arrive=True)
            assert not [one for one in receipts if isinstance(one, Failed) and not one.is_retryable], receipts
            left = [one for one, receipt in zip(left, receipts, strict=True) if receipt != Confirmed()]


async def test_topic_is_made_again_without_a_right_to_the_group_that_remembers_it(
    own_server: OwnKafka, transport: KafkaTransport
) -> None:
    """That it could not be remembered is told; the groups that are known here begin where the new topic does."""
    topic = new_topic()
    allow(own_server, topic, "shop")
    assert await transport.provision([topic], verify_only=False) == [(topic.name, "shop")]
    stream = await transport.subscribe(topic, "shop")
    await insist(transport, topic, packet("before"))
    await see(stream, "before")

    with capture_logs() as logs:
        await delete(own_server, topic)
        turn = 0
        while not [one for one in logs if one["event"] == "kafka.topic_made_again"]:
            # What the old topic still took is gone with it.
            await insist(transport, topic, packet(f"perhaps-{turn}"))
            turn += 1
        await insist(transport, topic, *(packet(f"r-{number}") for number in range(20)))
    await see(stream, *(f"r-{number}" for number in range(20)))

    told = [one for one in logs if one["event"] == "kafka.not_marked"]
    assert [(one["topic"], one["log_level"]) for one in told] == [(topic.name, "warning")]


async def test_new_group_is_made_without_a_right_to_the_group_that_remembers_its_topic(
    own_server: OwnKafka, transport: KafkaTransport
) -> None:
    """It cannot be known whether the topic was made again: the group gets what is sent from now on, as any new one."""
    topic = new_topic()
    books = topic._replace(groups=("books",))
    allow(own_server, topic, "shop", "books")
    await transport.provision([topic], verify_only=False)
    await insist(transport, topic, packet("old"))

    assert await transport.provision([books], verify_only=False) == [(topic.name, "books")]
    stream = await transport.subscribe(topic, "books")
    await insist(transport, topic, packet("new"))

    assert [one.packet.id for one in await stream.receive(10, WAIT_S)] == ["new"]


async def test_group_of_somebody_else_is_not_ours_to_read(own_server: OwnKafka, transport: KafkaTransport) -> None:
    """The rights of the tests above are what they say."""
    topic = new_topic()
    allow(own_server, topic, "shop")

    with pytest.raises((SettingInvalid, BrokerUnreachable)):
        await transport.provision([topic._replace(groups=("books",))], verify_only=False)
