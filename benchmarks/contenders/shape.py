"""What every contender is given and has to do: the same records, the same number under way, the same promises."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from kassa.ids import new_id
from kassa.messaging.model import Record
from kassa.messaging.packing import ENVELOPE_RECORDS_MAX, ENVELOPE_TYPE
from kassa.messaging.topology import LANES, lane

GROUP = "bench"
SENDERS = 4
"""Batches under way at once."""
BATCH, BATCH_OF_ENVELOPES = 100, 500
"""Records that a sender has confirmed together, and that a consumer acknowledges together."""
KEYS = 400
PREFETCH = 100
"""Messages of one queue that a raw consumer has ahead."""
BODY = msgspec.json.encode({"id": "pay_", "object": "payment", "amount": 100, "note": "x" * 551})
"""600 bytes."""


class Failure(Exception):
    """A contender did not do what it was told, so its figures mean nothing."""


class Contender(Protocol):
    """One client on one topic, connected. Messages that are published before `consume` wait for it."""

    async def publish(self, records: Sequence[Record]) -> None:
        """All of them confirmed, SENDERS batches under way. Raises Failure."""
        ...

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        """Receives and acknowledges so many; their ids. began: called when the first ones are here, so that it does not count
        how long a group takes to find itself."""
        ...


def records(count: int) -> list[Record]:
    """Events as the relay sends them: CloudEvents in binary mode, of KEYS keys in turn."""
    made = []
    for number in range(count):
        id = new_id()
        headers = {
            "content-type": "application/json",
            "ce-specversion": "1.0",
            "ce-id": id,
            "ce-source": "kassa",
            "ce-type": "payment.succeeded",
            "ce-subject": f"pay_{number % KEYS}",
            "ce-time": "2026-11-25T12:00:00.000000Z",
            "ce-sequence": str(number),
        }
        made.append(Record(id, f"key-{number % KEYS}", BODY, headers, home=7))
    return made


async def in_batches(records: Sequence[Record], size: int, send: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
    """SENDERS senders share the batches; each sends its next one when its last one is confirmed."""
    batches = iter([records[start : start + size] for start in range(0, len(records), size)])

    async def sender() -> None:
        for batch in batches:
            await send(batch)

    async with asyncio.TaskGroup() as senders:
        for _ in range(SENDERS):
            senders.create_task(sender())


class Message(NamedTuple):
    """What a raw client sends as one: a record, or an envelope of several."""

    id: str
    key: str
    lane: int
    headers: dict[str, str]
    body: bytes


def one_by_one(records: Iterable[Record]) -> list[Message]:
    """A message per record."""
    return [Message(one.id, one.key, lane(one.key, LANES), one.headers, one.body) for one in records]


def in_envelopes(records: Iterable[Record]) -> list[Message]:
    """The envelopes that Kassa sends (CloudEvents batch mode, one lane in each), made as a user would make them."""
    lanes: dict[int, list[Record]] = {}
    for one in records:
        lanes.setdefault(lane(one.key, LANES), []).append(one)
    made = []
    for number, some in lanes.items():
        for start in range(0, len(some), ENVELOPE_RECORDS_MAX):
            inside = some[start : start + ENVELOPE_RECORDS_MAX]
            body = _encode([_event(one) for one in inside])
            made.append(Message(inside[0].id, str(number), number, {"content-type": ENVELOPE_TYPE}, body))
    return made


def records_in(key: str, headers: dict[str, str], body: bytes) -> list[Record]:
    """Of a message: the id, key, headers and bytes of each, as Kassa's consumers get them."""
    if headers.get("content-type") != ENVELOPE_TYPE:
        return [Record(headers["ce-id"], key, body, headers)]
    return [_record(event) for event in _decode(body)]


def messages_of(count: int, *, envelopes: bool) -> int:
    """How many messages so many records make at least: a consumer waits for records, and asks for messages."""
    return math.ceil(count / ENVELOPE_RECORDS_MAX) if envelopes else count


class _Event(msgspec.Struct, kw_only=True, gc=False):
    """An item of an envelope, with all that these have."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    sequence: str
    datacontenttype: str
    data: msgspec.Raw
    kassakey: str


def _event(record: Record) -> _Event:
    headers = record.headers
    return _Event(
        specversion=headers["ce-specversion"], id=record.id, source=headers["ce-source"], type=headers["ce-type"],
        subject=headers["ce-subject"], time=headers["ce-time"], sequence=headers["ce-sequence"],
        datacontenttype=headers["content-type"], data=msgspec.Raw(record.body), kassakey=record.key,
    )  # fmt: skip


def _record(event: _Event) -> Record:
    headers = {
        "ce-specversion": event.specversion,
        "ce-id": event.id,
        "ce-source": event.source,
        "ce-type": event.type,
        "ce-subject": event.subject,
        "ce-time": event.time,
        "ce-sequence": event.sequence,
        "content-type": event.datacontenttype,
    }
    return Record(event.id, event.kassakey, bytes(event.data), headers)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[_Event]).decode
