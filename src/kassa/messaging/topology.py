"""Which topics exist, and who receives them: declared here, created by each binder, printable. Pure."""

from collections.abc import Sequence
from typing import Literal, NamedTuple
from zlib import crc32

LANES = 8
"""Lanes of a topic on the wire, so that envelopes fill; more lanes mean more consumers side by side."""

Declaration = Literal["kassa", "plain", "durable", "passive"]


class Topic(NamedTuple):
    """A topic with its groups. Each group gets every record; within a group each record is handled once."""

    name: str
    groups: tuple[str, ...]
    about: str
    lanes: int = LANES
    keyed: bool = True
    """Whether records of one key keep their order."""
    envelopes: bool = False
    """Whether records travel in envelopes (CloudEvents batch mode), for consumers that are Kassa's own."""
    classes: bool = False
    """Whether urgent records (priority 7 … 9) and those that can wait (0 … 2) travel apart, and urgent ones first."""
    exchange: str | None = None
    """RabbitMQ: the exchange, where it has another name than the topic."""
    declaration: Declaration = "kassa"
    """RabbitMQ: how the queue is declared. `kassa`: ours, a quorum queue per lane; else one queue of the topic's name, as
    other people's programs declare it: `plain` (not durable, no arguments), `durable`, or `passive` (it must be there)."""


URGENT, NORMAL, LOW = "urgent", "normal", "low"
CLASSES = (URGENT, NORMAL, LOW)
"""In the order in which they are received."""

EVENTS = Topic("kassa.events", (), "Every event of INTERFACES, keyed by its root, one by one: for everybody.")
EVENT_BATCHES = Topic(
    "kassa.events.batch", (), "The same events in envelopes, for consumers made with kassa.messaging.", envelopes=True
)
PAYMENT_ORDERS = Topic(
    "payment_order", ("kassa",), "Requests to pay, refund, query and close; answers go to reply_to.",
    lanes=1, keyed=False, exchange="payment", declaration="plain",
)  # fmt: skip

TOPOLOGY: tuple[Topic, ...] = (EVENTS, EVENT_BATCHES, PAYMENT_ORDERS)


def class_of(priority: int) -> str:
    """The class of a priority of 0 … 9."""
    return URGENT if priority >= 7 else NORMAL if priority >= 3 else LOW


def of_class(topic: Topic, class_: str) -> Topic:
    """The topic in which one class travels: the normal one has the topic's own name."""
    return topic if class_ == NORMAL else topic._replace(name=f"{topic.name}.{class_}", classes=False)


def travelling(topic: Topic) -> tuple[Topic, ...]:
    """What a broker has of a topic, in the order in which it is received."""
    return tuple(of_class(topic, one) for one in CLASSES) if topic.classes else (topic,)


def lane(key: str, lanes: int) -> int:
    """Where records of a key go: the same in every process and language."""
    return crc32(key.encode()) % lanes


def describe(topics: Sequence[Topic]) -> str:
    """The topology as a person reads it."""
    lines = []
    for topic in topics:
        lines.append(f"{topic.name}  {topic.lanes} lanes{', ordered by key' if topic.keyed else ''}")
        lines.append(f"    {topic.about}")
        lines += [f"    → {group}" for group in topic.groups]
    return "\n".join(lines)
