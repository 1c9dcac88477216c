"""Records in packets: one by one (CloudEvents binary mode where the record is an event), or many in an envelope. Pure.

Source: CloudEvents 1.0.2, "JSON batch format" (https://github.com/cloudevents/spec, cloudevents/formats/json-format.md).
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import accumulate

import msgspec

from kassa.clock import rfc3339
from kassa.messaging.model import PRIORITY_MAX, Packet, Record
from kassa.messaging.topology import Topic, lane

ENVELOPE_TYPE = "application/cloudevents-batch+json"
ENVELOPE_RECORDS_MAX = 100
NESTED_MAX = 100
"""JSON within JSON in an envelope. How much its reader bears depends on where he stands, and one that he cannot bear would take the
others in its envelope along."""
ENVELOPE_BYTES_MAX = 256 * 1024
"""Where bigger envelopes stopped to help, and every broker still takes them."""
ID, KEY, PRIORITY, HOME = "kassa-id", "kassa-key", "kassa-priority", "kassa-home"
"""Headers beside a record that travels by itself; an event of ours is named by its `ce-id`."""
VIA = "kassa-via"
"""Over which broker a record came that has to wait in our own tables. Who says it over a broker is not believed."""
JSON_TYPE = "application/json"
_SAID = ("content-type", "correlation-id")
"""Headers that make another message of a stranger's. The others may differ when he sends the same one again (`reply-to`,
`traceparent`), or the broker gives it out again (`x-death`)."""
_DIGITS, _HEXADECIMAL = 32, frozenset("0123456789abcdef")
NAME_BYTES_MAX = 512
"""Of an id or a key: what one of PostgreSQL's indexes takes whole, with room for others beside it."""
_SHORT = NAME_BYTES_MAX // 4
"""So many characters are never more bytes than that."""
_PRIORITY, _HOME_MAX = Record("", "", b"", {}).priority, 2**63 - 1
SOURCE = "kassa"
_OUR_SOURCES = frozenset({"", SOURCE, "kassa.messaging"})
"""Of events whose id is theirs alone."""
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a reader of JSON says to somebody else's bytes: no JSON, no text, or nested beyond all use."""


class Undecodable(Exception):
    """A packet that no record can be read from."""


class Packed(msgspec.Struct, frozen=True, gc=False):
    """A packet, and which of the records that were sent are in it."""

    packet: Packet
    places: list[int]


def pack(topic: Topic, records: Sequence[Record], now: datetime) -> list[Packed]:
    """Records as they travel on a topic."""
    if not topic.envelopes:
        return [Packed(single(record), [place]) for place, record in enumerate(records)]
    return list(_envelopes(topic, records, now))


def unpack(packet: Packet, new_name: Callable[[], str]) -> list[Record]:
    """The records of a packet. new_name: an id for one that came without.

    Raises Undecodable.
    """
    content_type = packet.headers.get("content-type", "")
    if content_type != JSON_TYPE and _is_envelope(content_type):
        return _opened(packet)
    return [_single(packet, new_name)]


def _is_envelope(content_type: str) -> bool:
    return content_type == ENVELOPE_TYPE or content_type.partition(";")[0].strip().lower() == ENVELOPE_TYPE


# One by one


def single(record: Record) -> Packet:
    """A record by itself; what the broker's own message has no place for goes into headers."""
    headers = record.headers.copy()
    if ID in headers or headers.get("ce-id") != record.id or headers.get("ce-source", "") not in _OUR_SOURCES:
        headers[ID] = record.id
    if record.key:
        headers[KEY] = record.key
    if record.priority != _PRIORITY:
        headers[PRIORITY] = str(record.priority)
    if record.home:
        headers[HOME] = str(record.home)
    return Packet(record.id, record.key, record.body, headers)


def _single(packet: Packet, new_name: Callable[[], str]) -> Record:
    headers = packet.headers.copy()
    id = headers.pop(ID, "") or _event_id(headers) or strangers_id(packet) or new_name()
    key = headers.pop(KEY, packet.key)
    priority = min(_number(headers.pop(PRIORITY), _PRIORITY), PRIORITY_MAX) if PRIORITY in headers else _PRIORITY
    home = _number(headers.pop(HOME), 0) if HOME in headers else 0
    headers.pop(VIA, None)
    if _is_long(id + key):
        id, key = _name(id), _name(key)
    return Record(id, key, packet.body, headers, priority, 0.0, home)


def believed(record: Record) -> Record:
    """Without what only our own tables may say."""
    if VIA not in record.headers:
        return record
    headers = {name: value for name, value in record.headers.items() if name != VIA}
    return msgspec.structs.replace(record, headers=headers)


def _event_id(headers: dict[str, str]) -> str:
    """Of somebody's CloudEvent: two sources may number theirs alike."""
    id, source = headers.get("ce-id", ""), headers.get("ce-source", "")
    return id if not id or source in _OUR_SOURCES else f"{source} {id}"


def _is_long(text: str) -> bool:
    return len(text) > _SHORT or not text.isascii() or "\0" in text


def _name(text: str) -> str:
    """An id or a key as PostgreSQL keeps it: without zero bytes, and one that is too long as its beginning with a digest of all."""
    if not _is_long(text):
        return text
    raw = text.encode(errors="replace")
    if len(raw) > NAME_BYTES_MAX:
        raw = raw[: NAME_BYTES_MAX - _DIGITS - 1] + b"." + hashlib.sha256(raw).hexdigest()[:_DIGITS].encode()
    return raw.decode(errors="ignore").replace("\0", "\ufffd")


def strangers_id(packet: Packet) -> str:
    """What a packet is named by somebody who may give the same id to all of his, or share it with others; '' if by nobody.

    Its id, and a digest of what he said: the same message has the same each time it comes, also when he sends it again.
    """
    if not packet.id:
        return ""
    said = [packet.key, *(packet.headers.get(name) for name in _SAID)]
    digest = hashlib.sha256(repr(said).encode(errors="backslashreplace") + packet.body)
    return f"{_name(packet.id)}.{digest.hexdigest()[:_DIGITS]}"


def without_digest(id: str) -> str:
    """What a stranger called his message; any other record's id as it is."""
    name, _, digest = id.rpartition(".")
    return name if name and len(digest) == _DIGITS and not set(digest) - _HEXADECIMAL else id


def _number(text: str, default: int) -> int:
    return int(text) if 0 < len(text) <= 18 and text.isascii() and text.isdigit() else default


# Envelopes

_NO_DATA = msgspec.Raw()


class _Item(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    """One CloudEvent of an envelope. What is not an event of the log is one as well: a record with a type of its own."""

    specversion: str = ""
    id: str
    source: str = ""
    type: str = ""
    subject: str = ""
    time: str = ""
    sequence: str = ""
    datacontenttype: str = ""
    data: msgspec.Raw = _NO_DATA
    data_base64: str = ""
    kassakey: str = ""
    kassapriority: int = _PRIORITY
    kassahome: int = 0
    kassaheaders: str = ""
    """JSON text of the headers that are no attribute of a CloudEvent: an extension's value may not be an object."""


_HEADERS = frozenset({
    "content-type", "ce-id", "ce-specversion", "ce-source", "ce-type", "ce-subject", "ce-time", "ce-sequence",
})  # fmt: skip
"""Those that are attributes of an item; the others travel in `kassaheaders`."""
_encode = msgspec.json.Encoder().encode
_decode_items = msgspec.json.Decoder(list[_Item]).decode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode
_skim = msgspec.json.Decoder(msgspec.Raw).decode
RECORD_TYPE = "kassa.record"
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)).difference(b"[]{}"))


def _envelopes(topic: Topic, records: Sequence[Record], now: datetime) -> Iterator[Packed]:
    """Of each lane as many records as fit into one envelope, in the order in which they were given."""
    lanes: dict[int, list[int]] = {}
    for place, record in enumerate(records):
        lanes.setdefault(lane(record.key or record.id, topic.lanes), []).append(place)
    sent_at = rfc3339(now)
    for number, places in sorted(lanes.items()):
        items: list[bytes] = []
        inside: list[int] = []
        size = 0
        for place in places:
            item = _encode(_item(records[place], sent_at))
            if inside and (len(inside) == ENVELOPE_RECORDS_MAX or size + len(item) > ENVELOPE_BYTES_MAX):
                yield Packed(_envelope(number, records[inside[0]].id, items), inside)
                items, inside, size = [], [], 0
            items.append(item)
            inside.append(place)
            size += len(item) + 1
        yield Packed(_envelope(number, records[inside[0]].id, items), inside)


def _envelope(number: int, first: str, items: Sequence[bytes]) -> Packet:
    body = b"[" + b",".join(items) + b"]"
    return Packet(first, str(number), body, {"content-type": ENVELOPE_TYPE})


def _item(record: Record, sent_at: str) -> _Item:
    headers = record.headers
    content_type = headers.get("content-type", "")
    is_json = content_type == JSON_TYPE and _is_json(record.body)
    return _Item(
        id=record.id,
        specversion=headers.get("ce-specversion") or "1.0",
        source=headers.get("ce-source") or SOURCE,
        type=headers.get("ce-type") or RECORD_TYPE,
        subject=headers.get("ce-subject", ""),
        time=headers.get("ce-time") or sent_at,
        sequence=headers.get("ce-sequence", ""),
        datacontenttype=content_type,
        data=msgspec.Raw(record.body) if is_json else _NO_DATA,
        data_base64="" if is_json else base64.b64encode(record.body).decode(),
        kassakey=record.key,
        kassapriority=record.priority,
        kassahome=record.home,
        kassaheaders="" if headers.keys() <= _HEADERS else _other_headers(headers),
    )


def _other_headers(headers: dict[str, str]) -> str:
    return _encode({name: value for name, value in headers.items() if name not in _HEADERS}).decode()


def _is_json(body: bytes) -> bool:
    try:
        if body.count(b"[") + body.count(b"{") > NESTED_MAX and _depth(body) > NESTED_MAX:
            return False
        # Looks at everything but whether what is between quotes is text.
        _skim(body)
        return body.isascii() or bool(body.decode())
    except UNREADABLE:
        return False


def _depth(body: bytes) -> int:
    """How deep lists and objects are nested."""
    brackets = _QUOTED.sub(b"", body).translate(None, _NO_BRACKETS)
    return max(accumulate(1 if one in b"[{" else -1 for one in brackets), default=0)


def _opened(packet: Packet) -> list[Record]:
    try:
        return [_record(item) for item in _decode_items(packet.body)]
    except (*UNREADABLE, binascii.Error) as error:
        raise Undecodable(f"the envelope cannot be read: {error}") from error


def _record(item: _Item) -> Record:
    if item.type and item.type != RECORD_TYPE:
        headers = _event_headers(item)
    else:
        headers = {"content-type": item.datacontenttype} if item.datacontenttype else {}
    if item.kassaheaders:
        headers = _decode_headers(item.kassaheaders) | headers
        headers.pop(VIA, None)
    body = base64.b64decode(item.data_base64, validate=True) if item.data_base64 else bytes(item.data)
    priority, home = item.kassapriority, item.kassahome
    if not (0 <= priority <= PRIORITY_MAX and 0 <= home <= _HOME_MAX):
        priority, home = min(max(priority, 0), PRIORITY_MAX), min(max(home, 0), _HOME_MAX)
    id, key = item.id, item.kassakey
    if not id or _is_long(id + key):
        id, key = _name(id) or _unnamed(item), _name(key)
    return Record(id, key, body, headers, priority, 0.0, home)


def _unnamed(item: _Item) -> str:
    """The id of one that came without: what it says, so that it has the same when it comes again."""
    return hashlib.sha256(_encode(item)).hexdigest()[:_DIGITS]


def _event_headers(item: _Item) -> dict[str, str]:
    headers = {
        "content-type": item.datacontenttype,
        "ce-id": item.id,
        "ce-specversion": item.specversion,
        "ce-source": item.source,
        "ce-type": item.type,
        "ce-subject": item.subject,
        "ce-time": item.time,
        "ce-sequence": item.sequence,
    }
    # Ours have them all.
    return headers if all(headers.values()) else {name: value for name, value in headers.items() if value}
