"""An account of Kafka that has rights to single names: its topic and its own group, and no group beside it."""

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

from brokers.kafka_house import (
    WAIT_S,
    OwnKafka,
    delete,
    insist,
    new_topic,
    open_transport,
    own_kafka,
    packet,
    until_heard,
)
from brokers.streams import see
from kassa.errors import BrokerUnreachable, SettingInvalid
from kassa.messaging.binders.kafka import KafkaTransport, group_id
from kassa.messaging.model import Failed
from kassa.messaging.topology import Topic

pytestmark = pytest.mark.needs("kafka")


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnKafka]:
    """One whose users have only the rights that somebody gives."""
    with own_kafka() as server:
        yield server


@pytest.fixture
async def transport(own_server: OwnKafka) -> AsyncIterator[KafkaTransport]:
    async with open_transport(own_server.safe_url) as opened:
        yield opened


def allow(
    server: OwnKafka, topic: Topic, *groups: str, to: Sequence[str] = ("CREATE", "WRITE", "READ", "DESCRIBE")
) -> None:
    """All that Kassa needs of a topic, or this, and of these of its groups, each by its full name."""
    rights = [(ResourceType.TOPIC, topic.name, one) for one in to]
    rights += [(ResourceType.GROUP, group_id(topic.name, group), "READ") for group in groups]
    bindings = [
        AclBinding(
            kind, name, ResourcePatternType.LITERAL, f"User:{server.username}", "*", AclOperation[operation],
            AclPermissionType.ALLOW,
        )
        for kind, name, operation in rights
    ]  # fmt: skip
    admin = AdminClient({"bootstrap.servers": server.bootstrap})
    for binding, future in admin.create_acls(bindings).items():
        future.result()
        until_heard(admin, binding, is_given=True)


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


async def test_answer_to_a_topic_that_we_may_only_see_is_given_up(
    own_server: OwnKafka, transport: KafkaTransport
) -> None:
    """Nobody who reads answers there gives us a right; for a topic that we made somebody can."""
    theirs, ours = new_topic(), new_topic()
    async with open_transport(own_server.url) as owner:
        await owner.provision([theirs], verify_only=False)
    allow(own_server, theirs, to=["DESCRIBE"])
    allow(own_server, ours, "shop", to=["CREATE", "READ", "DESCRIBE"])
    await transport.provision([ours], verify_only=False)

    answered = [await transport.reply(one.name, [packet("r-1")], deadline_s=WAIT_S) for one in (theirs, ours)]

    for (receipt,), is_retryable in zip(answered, (False, True), strict=True):
        assert isinstance(receipt, Failed)
        assert ("no right" in receipt.reason, receipt.is_retryable) == (True, is_retryable)
