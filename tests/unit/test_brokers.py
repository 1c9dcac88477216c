"""Which broker carries what."""

import pytest

from kassa.errors import SettingInvalid
from kassa.messaging import Messaging
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.replies import GIVEN_UP_S, reply_delay

OURS = ("kassa.events", "kassa.events.batch", "payment_order")


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ((), []),
        (("postgres",), [("postgres", "postgres", OURS)]),
        (
            ("memory", "postgres#payment_order"),
            [("memory", "memory", OURS[:2]), ("postgres", "postgres", OURS[2:])],
        ),
        (
            ("postgres://x/y?z=1#kassa.events,mails", "postgres"),
            [("postgres", "postgres://x/y?z=1", ("kassa.events", "mails")), ("postgres-2", "postgres", OURS[1:])],
        ),
        (("memory", "postgres"), [("memory", "memory", OURS), ("postgres", "postgres", OURS)]),
    ],
)
def test_one_without_topics_takes_what_no_other_one_names(urls: tuple[str, ...], expected: list[object]) -> None:
    assert [one[:3] for one in read_brokers(urls)] == expected


def test_a_name_of_its_own_stays_when_another_one_goes() -> None:
    both = read_brokers(("amqp://a:1/shop?heartbeat=5&name=north", "amqp://b?name=south"))

    assert [(one.name, one.url) for one in both] == [
        ("rabbitmq-north", "amqp://a:1/shop?heartbeat=5"), ("rabbitmq-south", "amqp://b"),
    ]  # fmt: skip
    assert read_brokers(("amqp://b?name=south",))[0].name == "rabbitmq-south"


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        (("amqp://a?name=x", "amqp://b?name=x"), "Two brokers are called rabbitmq-x"),
        (("amqp://u:secret@a?name=X",), r"amqp://u:\*\*\*@a\S*: name is one name of a to z"),
        (("amqp://a?name=",), "name is one name"),
        (
            ("amqp://u:p/secret@a",),
            r"A broker's URL \(amqp\) has an @ behind a /: percent-encode what is special in its password",
        ),
        (("amqp://a?name=x&name=y",), "name is one name"),
        (("kafka://b:9092#kassa.events,postgres",), "topics called postgres: separate brokers by spaces"),
        (("kafka://b1:9092", "b2"), "There is no broker 'b2'.*Several hosts of one: each with its port"),
    ],
)
def test_what_cannot_be_read_is_refused(urls: tuple[str, ...], says: str) -> None:
    with pytest.raises(SettingInvalid, match=says):
        read_brokers(urls)


def test_a_broker_that_does_not_exist_is_refused_without_its_password() -> None:
    with pytest.raises(SettingInvalid, match=r"There is no broker 'pigeon://a:\*\*\*@b'"):
        read_brokers(("pigeon://a:secret@b",))


def test_an_answer_is_tried_for_an_hour_with_growing_pauses() -> None:
    delays: list[float] = []
    while (delay := reply_delay(len(delays) + 1)) is not None:
        delays.append(delay)

    assert delays == sorted(delays)
    assert delays[0] == 1.0
    assert GIVEN_UP_S <= sum(delays) <= GIVEN_UP_S + delays[-1]


def test_service_takes_the_url_that_kassa_has_without_its_name_and_topics_there() -> None:
    messaging = Messaging("amqp://h?name=shop&heartbeat=5#kassa.events", "postgresql://nowhere/shop")

    assert messaging._broker_url == "amqp://h?heartbeat=5"
