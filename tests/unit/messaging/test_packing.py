"""Records in packets and back; others' software reads the envelopes."""

from datetime import UTC, datetime

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from kassa.messaging.model import Packet, Record
from kassa.messaging.packing import (
    ENVELOPE_BYTES_MAX,
    ENVELOPE_RECORDS_MAX,
    NAME_BYTES_MAX,
    Undecodable,
    believed,
    pack,
    single,
    unpack,
    without_digest,
)
from kassa.messaging.topology import Topic, lane

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SINGLE = Topic("t", ("g",), "")
ENVELOPES = Topic("t", ("g",), "", envelopes=True)
EVENT = Record(
    "evt_1", "0190", b'{"a": [1, "\xc3\xbc"]}',
    {
        "content-type": "application/json", "ce-specversion": "1.0", "ce-id": "evt_1", "ce-source": "kassa",
        "ce-type": "payment.succeeded", "ce-subject": "pay_1", "ce-time": "2026-03-01T00:00:00.000Z", "ce-sequence": "3",
    },
)  # fmt: skip

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
records = st.lists(
    st.builds(
        Record,
        id=st.text("abc123", min_size=1, max_size=8),
        key=texts,
        body=st.one_of(st.binary(max_size=50), st.just(b"{}"), st.just(b" [1, 2] \n")),
        headers=st.dictionaries(st.sampled_from(["content-type", "x", "correlation-id"]), texts.filter(bool)),
        priority=st.integers(0, 9),
        delay_s=st.just(0.0),
        home=st.integers(0, 2**40),
    ),
    max_size=30,
)


def never() -> str:
    raise AssertionError("every record has an id of its own")


@given(records, st.sampled_from([SINGLE, ENVELOPES]))
def test_records_come_out_as_they_went_in(sent: list[Record], topic: Topic) -> None:
    packed = pack(topic, sent, NOW)

    came = {
        place: record
        for one in packed
        for place, record in zip(one.places, unpack(one.packet, never), strict=True)
    }  # fmt: skip
    assert [came[place] for place in range(len(sent))] == sent


@given(records)
def test_envelope_holds_one_lane_in_the_order_that_was_given(sent: list[Record]) -> None:
    for one in pack(ENVELOPES, sent, NOW):
        assert one.places == sorted(one.places)
        assert {str(lane(sent[place].key or sent[place].id, ENVELOPES.lanes)) for place in one.places} == {
            one.packet.key
        }


def test_envelope_is_bounded_in_records_and_bytes() -> None:
    many = [Record(f"r-{number}", "k", b"{}", {}) for number in range(ENVELOPE_RECORDS_MAX + 1)]
    large = [Record(f"r-{number}", "k", bytes(ENVELOPE_BYTES_MAX // 2), {}) for number in range(3)]

    assert [len(one.places) for one in pack(ENVELOPES, many, NOW)] == [ENVELOPE_RECORDS_MAX, 1]
    assert [len(one.places) for one in pack(ENVELOPES, large, NOW)] == [1, 1, 1]


def test_cloudevents_package_reads_every_event_of_an_envelope() -> None:
    plain = Record("r-1", "0190", b"\x00\xff", {"x": "1"})
    (packed,) = pack(ENVELOPES, [EVENT, plain], NOW)

    assert packed.packet.headers["content-type"] == "application/cloudevents-batch+json"
    events = [JSONFormat().read(None, msgspec.json.encode(one)) for one in msgspec.json.decode(packed.packet.body)]

    told, kept = events
    assert (told.get_id(), told.get_type(), told.get_subject()) == ("evt_1", "payment.succeeded", "pay_1")
    assert told.get_data() == {"a": [1, "ü"]}
    assert (kept.get_id(), kept.get_type(), kept.get_data()) == ("r-1", "kassa.record", b"\x00\xff")


def test_item_with_fields_of_a_later_version_is_read() -> None:
    body = b'[{"specversion":"1.0","id":"r-1","source":"kassa","type":"payment.frozen","data":{},"kassanew":{"a":1}}]'

    (record,) = unpack(Packet("r-1", "0", body, {"content-type": "application/cloudevents-batch+json"}), never)

    assert (record.id, record.headers["ce-type"]) == ("r-1", "payment.frozen")


@pytest.mark.parametrize(
    "absent", sorted(EVENT.headers.keys() - {"ce-id", "ce-type", "ce-specversion", "ce-source", "ce-time"})
)
def test_event_comes_out_of_an_envelope_with_what_it_had_and_nothing_else(absent: str) -> None:
    headers = {name: value for name, value in EVENT.headers.items() if name != absent} | {"x": "1"}
    sent = msgspec.structs.replace(EVENT, headers=headers)
    (packed,) = pack(ENVELOPES, [sent], NOW)

    assert unpack(packed.packet, never) == [sent]


def test_header_beside_an_event_does_not_take_the_place_of_its_attribute() -> None:
    body = (
        b'[{"id":"r-1","type":"payment.frozen","data":{},"kassaheaders":"{\\"ce-type\\":\\"other\\",\\"x\\":\\"1\\"}"}]'
    )

    (record,) = unpack(Packet("r-1", "0", body, {"content-type": "application/cloudevents-batch+json"}), never)

    assert record.headers == {"ce-id": "r-1", "ce-type": "payment.frozen", "x": "1"}


@pytest.mark.parametrize("body", [b"", b"{}", b"[{}]", b"\xff", b'[{"id": 1}]', b'[{"id":"r","data_base64":"%"}]'])
def test_envelope_that_cannot_be_read_is_told_as_such(body: bytes) -> None:
    with pytest.raises(Undecodable):
        unpack(Packet("r-1", "0", body, {"content-type": "application/cloudevents-batch+json; charset=utf-8"}), never)


def test_message_of_somebody_who_never_heard_of_kassa_is_a_record() -> None:
    (record,) = unpack(Packet("", "", b'{"order_id": "1"}', {"kassa-priority": "many"}), lambda: "fresh")

    assert record == Record("fresh", "", b'{"order_id": "1"}', {}, 4)


def test_what_only_our_own_tables_may_say_is_believed_of_nobody_else() -> None:
    said = {"kassa-via": "rabbitmq", "x": "1"}
    body = b'[{"id":"r-1","data":{},"kassaheaders":"{\\"kassa-via\\":\\"rabbitmq\\",\\"x\\":\\"1\\"}"}]'

    (alone,) = unpack(Packet("r-1", "", b"{}", said), never)
    (enveloped,) = unpack(Packet("r-1", "0", body, {"content-type": "application/cloudevents-batch+json"}), never)
    by_peer = believed(Record("r-1", "", b"{}", said))

    assert alone.headers == enveloped.headers == by_peer.headers == {"x": "1"}


STRANGERS = Packet("1", "", b"{}", {"correlation-id": "a", "x": "1"})


@pytest.mark.parametrize(
    "other",
    [
        Packet("1", "", b"{ }", {"correlation-id": "a", "x": "1"}),
        Packet("1", "", b"{}", {"correlation-id": "b", "x": "1"}),
        Packet("1", "", b"{}", {"x": "1"}),
        Packet("1", "", b"{}", {"correlation-id": "a", "x": "1", "content-type": "text/plain"}),
        Packet("1", "k", b"{}", {"correlation-id": "a", "x": "1"}),
        Packet("2", "", b"{}", {"correlation-id": "a", "x": "1"}),
    ],
    ids=["body", "correlation id", "no correlation id", "content type", "key", "id"],
)
def test_other_message_under_an_id_that_a_stranger_gave_is_another_record(other: Packet) -> None:
    assert unpack(other, never)[0].id != unpack(STRANGERS, never)[0].id


@pytest.mark.parametrize(
    "changed",
    [{}, {"x-delivery-count": "3"}, {"x-death": "[]"}, {"reply-to": "amq.gen-2", "traceparent": "00-2"}, {"x": "2"}],
)
def test_strangers_message_that_comes_again_is_the_same_record(changed: dict[str, str]) -> None:
    again = Packet("1", "", b"{}", {"x": "1", "correlation-id": "a", **changed})

    assert unpack(again, never)[0].id == unpack(STRANGERS, never)[0].id
    assert unpack(STRANGERS, never)[0].id.startswith("1.")


def test_stranger_is_answered_by_the_name_that_he_gave() -> None:
    assert without_digest(unpack(STRANGERS, never)[0].id) == "1"
    assert [without_digest(id) for id in ("evt_1", "a.b", "0" * 32)] == ["evt_1", "a.b", "0" * 32]


def test_id_of_kassa_or_of_an_event_stays_as_it_is() -> None:
    (ours,) = unpack(Packet("1", "", b"{}", {"kassa-id": "r-1"}), never)
    (event,) = unpack(Packet("1", "", b"{}", {"ce-id": "evt_1"}), never)

    assert (ours.id, event.id) == ("r-1", "evt_1")


def test_events_of_two_sources_are_two_whatever_they_are_numbered() -> None:
    one, other = (Packet("", "", b"{}", {"ce-id": "1", "ce-source": source}) for source in ("/a", "/b"))

    assert [unpack(packet, never)[0].id for packet in (one, other)] == ["/a 1", "/b 1"]
    assert unpack(Packet("", "", b"{}", {"ce-id": "evt_1", "ce-source": "kassa"}), never)[0].id == "evt_1"


def test_name_that_is_too_long_is_cut_and_stays_a_name_of_its_own() -> None:
    ids = [unpack(Packet("", "", b"", {"kassa-id": "\u4e00" * 1000 + end}), never)[0].id for end in ("", "a", "a")]

    assert len(set(ids)) == 2 and ids[1] == ids[2]
    assert all(len(id.encode()) <= NAME_BYTES_MAX for id in ids)
    assert unpack(Packet("", "a\0b", b"", {"kassa-id": "1"}), never)[0].key == "a\ufffdb"


def test_body_that_is_nested_beyond_use_travels_as_bytes() -> None:
    body = b"[" * 2000 + b"]" * 2000
    (packed,) = pack(ENVELOPES, [Record("r-1", "k", body, {"content-type": "application/json"})], NOW)

    assert unpack(packed.packet, never)[0].body == body


@pytest.mark.parametrize(
    ("id", "source", "is_named"), [("e-1", "kassa", False), ("e-1", "elsewhere", True), ("e-2", "kassa", True)]
)
def test_event_of_ours_is_named_once(id: str, source: str, is_named: bool) -> None:
    record = Record(id, "", b"{}", {"ce-id": "e-1", "ce-source": source, "ce-type": "t"})

    packet = single(record)

    assert ("kassa-id" in packet.headers) == is_named
    assert unpack(packet, never) == [record]


def test_header_of_somebody_is_never_taken_for_the_records_id() -> None:
    event = Record("e-1", "", b"{}", {"ce-id": "e-1", "ce-source": "kassa", "kassa-id": "another"})

    (came,) = unpack(single(event), never)

    assert came.id == "e-1"


@pytest.mark.parametrize(
    ("body", "is_text"),
    [
        (b'{"a": "' + b"[{" * 400 + b'"}', True),
        (b"[" + b"{}," * 400 + b"{}]", True),
        (b"[" * 500 + b"]" * 500, False),
        (b'{"a":' * 200 + b"1" + b"}" * 200, False),
        (b'{"a": "\xff"}', False),
        (b'{"a": 1', False),
    ],
)
def test_envelope_has_as_json_what_every_reader_bears(body: bytes, is_text: bool) -> None:
    sent = [Record("r-1", "k", body, {"content-type": "application/json"}), Record("r-2", "k", b"{}", {})]
    (packed,) = pack(ENVELOPES, sent, NOW)

    assert (b'"data_base64"' in packed.packet.body.partition(b"r-2")[0]) is not is_text
    assert [one.body for one in unpack(packed.packet, never)] == [body, b"{}"]
