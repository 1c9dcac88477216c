"""Headers on their way to Kafka."""

from kassa.messaging.binders.kafka import _headers_out
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
