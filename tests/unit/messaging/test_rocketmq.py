"""RocketMQ without its server: what strangers may send us, and what gRPC may do to us."""

import pytest

from kassa.messaging.binders import rocketmq as ours
from kassa.messaging.binders import rocketmq_wire as wire


@pytest.mark.parametrize("names", [r'["\ud800"]', '[["x-empty"]]', '{"x-empty": 1}', "[", "[" * 100_000])
def test_names_of_empty_headers_that_are_no_text_are_passed_over(names: str) -> None:
    message = wire.make("Message", user_properties={ours.EMPTY_HEADERS: names})

    assert ours.packet_of(message).headers == {}


def test_name_that_is_no_text_costs_the_others_nothing() -> None:
    message = wire.make("Message", user_properties={ours.EMPTY_HEADERS: r'["\ud83d\ude00", "\ud800", "x-empty"]'})

    assert ours.packet_of(message).headers == {"😀": "", "x-empty": ""}
