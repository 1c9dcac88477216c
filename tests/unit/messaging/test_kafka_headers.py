"""Headers on their way to Kafka and back."""

from kassa.messaging.binders.kafka import _headers_in, _headers_out
from kassa.messaging.model import Packet


def test_half_of_a_character_never_reaches_the_client() -> None:
    packet = Packet("r-1", "", b"", {"kassa-id": "r-1", "x\udcff": "y\ud800"})

    assert _headers_out(packet) == {"kassa-id": b"r-1", "x?": b"y?"}


def test_what_kafka_says_by_itself_is_no_header_too() -> None:
    event = Packet("e-1", "k", b"", {"ce-id": "e-1", "kassa-key": "k"})

    assert _headers_out(event) == {"ce_id": "e-1"}
    assert _headers_out(Packet("r-1", "k", b"", {})) == {"kassa-id": "r-1"}


def test_nothing_is_cut_at_a_zero_byte() -> None:
    assert _headers_out(Packet("r\0", "", b"", {"x": "a\0b", "é": "é"})) == {
        "kassa-id": b"r\0", "x": b"a\0b", "é": "é".encode(),
    }  # fmt: skip


def test_headers_come_in_alike_whether_or_not_their_names_were_seen_before() -> None:
    pairs = [
        ("ce_id", b"e-1"),
        ("reply-topic", b"answers"),
        ("x-unseen", b"a\0b"),
        ("y-unseen", b"\xff"),
        ("z-unseen", None),
    ]
    expected = {"ce-id": "e-1", "reply-to": "answers", "x-unseen": "a\0b", "y-unseen": "\ufffd", "z-unseen": ""}

    assert [_headers_in(pairs), _headers_in(pairs), _headers_in(None)] == [expected, expected, {}]
    assert _headers_in(pairs[:3]) == dict(list(expected.items())[:3])
