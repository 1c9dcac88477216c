"""The document of the queues is valid AsyncAPI 3, and knows what really travels."""

import json
import re
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from flows.api.support import running
from kassa.api import asyncapi
from kassa.api.server import RAW
from kassa.ids import new_id
from kassa.messaging.binders import amqp, kafka, rabbitmq, rocketmq
from kassa.messaging.broker_names import OURS, read_brokers
from kassa.messaging.model import LogRecord, Packet, Place, Record
from kassa.messaging.packing import single
from kassa.messaging.relay import event_record
from kassa.messaging.topology import EVENTS, PAYMENT_ORDERS, Declaration

SCHEMA = json.loads((Path(__file__).parent / "asyncapi-3.0.0.json").read_text())
"""The schema of AsyncAPI 3.0.0 as its authors publish it (spec-json-schemas, Apache-2.0), without descriptions and examples."""


BROKERS = (
    "amqp://shop:secret@mq:5672/shop",
    "kafka+ssl://shop:secret@k1:9093,k2:9093",
    "rocketmq://proxy:8081?namesrv=names:9876",
    "zeromq://127.0.0.1:7000",
    "postgres",
)


def of(*urls: str, orders: Declaration | None = None) -> Any:
    return asyncapi.document(read_brokers(urls), version=version("kassa"), raw=RAW, orders=orders)


@pytest.mark.parametrize(
    "urls",
    [
        (),
        *[(url,) for url in BROKERS],
        BROKERS,
        ("memory#payment_order", "postgres#kassa.events,kassa.events.batch"),
        ("amqp://a", "amqp://b#payment_order,kassa.events", "kafka://c#kassa.events"),
        ("postgres#shop.mails",),
    ],
)
def test_the_document_is_valid_and_every_reference_leads_somewhere(urls: tuple[str, ...]) -> None:
    document = of(*urls)

    errors = jsonschema_rs.validator_for(SCHEMA).iter_errors(document)
    assert [f"{list(error.instance_path)}: {error.message}" for error in errors] == []
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        found = document
        for part in reference.split("/"):
            found = found[part]


@pytest.mark.parametrize("orders", ["plain", "durable"])
def test_on_rabbitmq_events_go_under_their_type_and_orders_have_a_queue(orders: Declaration) -> None:
    document = of(BROKERS[0], orders=orders)

    is_durable = orders == "durable"
    events, batches, requests = (
        document["channels"][name] for name in ("kassa_events", "kassa_events_batch", "payment_order")
    )
    assert document["servers"]["rabbitmq"] == {"host": "mq:5672", "protocol": "amqp", "pathname": "/shop"}
    assert events["address"] == "{type}"
    assert events["parameters"]["type"]["location"] == "$message.header#/ce-type"
    assert events["bindings"] == {
        "amqp": {
            "is": "routingKey",
            "exchange": {"name": rabbitmq.exchange_of(EVENTS), "type": "topic", "vhost": "shop", "durable": True},
        }
    }
    assert batches["address"] == "kassa.events.batch"
    assert requests["address"] == "payment_order"
    assert requests["bindings"]["amqp"] == {
        "is": "routingKey",
        "exchange": {
            "name": rabbitmq.exchange_of(PAYMENT_ORDERS), "type": "topic", "vhost": "shop", "durable": is_durable,
        },
        "x-queue": {
            "name": "payment_order", "vhost": "shop", "exclusive": False, "autoDelete": False, "durable": is_durable,
        },
    }  # fmt: skip


@pytest.mark.parametrize("orders", [None, "passive"])
def test_of_a_queue_whose_form_is_not_known_nothing_is_claimed(orders: Declaration | None) -> None:
    binding = of(BROKERS[0], orders=orders)["channels"]["payment_order"]["bindings"]["amqp"]

    assert "durable" not in binding["exchange"] | binding["x-queue"]
    assert binding["x-queue"]["description"]


def test_on_kafka_a_topic_has_a_partition_per_lane() -> None:
    document = of(BROKERS[1])

    assert document["servers"]["kafka"] == {"host": "k1:9093,k2:9093", "protocol": "kafka-secure"}
    assert of("kafka://k1?tls=1")["servers"]["kafka"]["protocol"] == "kafka-secure"
    channels = document["channels"]
    assert channels["kassa_events"]["address"] == "kassa.events"
    assert channels["kassa_events"]["bindings"] == {"kafka": {"topic": "kassa.events", "partitions": EVENTS.lanes}}
    assert channels["payment_order"]["bindings"] == {"kafka": {"topic": "payment_order"}}


def test_on_rocketmq_topics_have_the_names_that_they_have_there() -> None:
    document = of(BROKERS[2])

    assert document["servers"]["rocketmq"] == {"host": "proxy:8081", "protocol": "rocketmq"}
    channels = document["channels"]
    for name, topic in OURS.items():
        channel = channels[name.replace(".", "_")]
        assert channel["address"] == channel["bindings"]["x-rocketmq"]["topic"] == rocketmq.topic_name(name)
        assert channel["bindings"]["x-rocketmq"]["type"] == rocketmq._type(topic)
        assert channel["bindings"]["x-rocketmq"]["queues"] == topic.lanes
    assert channels["kassa_events"]["bindings"]["x-rocketmq"]["tag"] == "$message.header#/CE_type"


def test_on_zeromq_and_postgresql_it_is_said_who_can_send_and_receive() -> None:
    zeromq, postgres = of(BROKERS[3]), of(BROKERS[4])

    assert zeromq["servers"]["zeromq"] == {"host": "127.0.0.1:7000", "protocol": "zeromq"}
    assert zeromq["channels"]["kassa_events"]["bindings"] == {
        "x-zeromq": {"topic": "kassa.events", "client": "kassa.messaging"}
    }
    assert postgres["servers"]["postgres"]["protocol"] == "postgres"
    assert "database_url" in postgres["servers"]["postgres"]["description"]
    assert postgres["channels"]["payment_order"]["bindings"] == {
        "x-postgres": {"topic": "payment_order", "functions": ["kassa_send"]}
    }
    assert postgres["channels"]["kassa_events"]["bindings"]["x-postgres"]["functions"] == [
        "kassa_listen",
        "kassa_receive",
    ]


EVENT = LogRecord(Place(1, 2, 3), 0, new_id(), 1, datetime(2026, 1, 1, tzinfo=UTC), "payment.succeeded", b"{}")
REQUEST = Record("r-1", "", b"{}", {"content-type": "application/json", "reply-to": "answers", "correlation-id": "42"})


def on_rabbitmq(packet: Packet) -> set[str]:
    properties = amqp._properties(packet, None, 0)
    taken = {"reply_to", "correlation_id"}
    return {*(properties.headers or ()), *(name for name in taken if getattr(properties, name) is not None)}


def on_kafka(packet: Packet) -> set[str]:
    return set(kafka._headers_out(packet))


def on_rocketmq(packet: Packet) -> set[str]:
    return {*rocketmq.message_of(packet, "topic", "").user_properties}


def as_they_are(packet: Packet) -> set[str]:
    return {*packet.headers}


@pytest.mark.parametrize(
    ("url", "sent"), [*zip(BROKERS, (on_rabbitmq, on_kafka, on_rocketmq, as_they_are, as_they_are), strict=True)]
)
def test_headers_are_those_that_the_binder_really_sends(url: str, sent: Any) -> None:
    messages = of(url)["components"]["messages"]

    event, request = sent(single(event_record(EVENT))), sent(single(REQUEST))

    attributes = {name for name in event if name[:3].lower() in ("ce-", "ce_")}
    assert set(messages["payment_event"]["headers"]["required"]) == attributes
    assert len(attributes) >= 7
    asked = set(messages["pay"]["headers"]["properties"])
    assert asked <= request
    assert len(asked) == 2
    correlation = messages["pay"]["correlationId"]["location"].rpartition("/")[2]
    assert correlation in messages["answer"]["headers"]["properties"]
    assert correlation in request


@pytest.mark.parametrize(
    ("url", "reply_to"),
    [*zip(BROKERS, ("reply_to", "reply-topic", "reply-topic", "reply-to", "reply-to"), strict=True)],
)
def test_the_answer_goes_where_the_request_says(url: str, reply_to: str) -> None:
    document = of(url)

    reply = document["operations"]["take_request"]["reply"]

    assert reply["address"]["location"] == f"$message.header#/{reply_to}"
    assert reply["channel"] == {"$ref": "#/channels/answers"}
    assert reply["messages"] == [{"$ref": "#/channels/answers/messages/answer"}]
    assert document["channels"]["answers"]["address"] is None
    assert document["channels"]["answers"]["messages"] == {"answer": {"$ref": "#/components/messages/answer"}}


def test_a_topic_of_several_brokers_has_a_channel_on_each_with_its_own_names() -> None:
    document = of("kafka://k#kassa.events", "rocketmq://r#kassa.events", "postgres#payment_order")

    channels, messages = document["channels"], document["components"]["messages"]
    assert [*channels] == ["kassa_events_kafka", "kassa_events_rocketmq", "payment_order", "answers"]
    assert channels["kassa_events_rocketmq"]["address"] == "kassa--events"
    assert channels["kassa_events_rocketmq"]["servers"] == [{"$ref": "#/servers/rocketmq"}]
    assert channels["kassa_events_kafka"]["messages"]["payment_event"] == {
        "$ref": "#/components/messages/payment_event_kafka"
    }
    assert "ce_type" in messages["payment_event_kafka"]["headers"]["required"]
    assert "CE_type" in messages["payment_event_rocketmq"]["headers"]["required"]
    assert "reply-to" in messages["pay"]["headers"]["properties"]
    assert [*document["operations"]] == [
        "publish_kassa_events_kafka", "publish_kassa_events_rocketmq", "take_request",
    ]  # fmt: skip


def test_every_event_that_a_payment_can_tell_of_is_in_it() -> None:
    told: set[str] = set()
    for name in ("draft.py", "model.py", "refunds.py"):
        text = (files("kassa.payments") / name).read_text()
        told |= {f"payment.{what}" for what in re.findall(r'\.tell\("([a-z_]+)"', text)}
        told |= {f"refund.{what}" for what in re.findall(r'\.tell_refund\("([a-z_]+)"', text)}
    known = {f"{noun}.{type_}" for noun, types in asyncapi.EVENT_TYPES.items() for type_ in types}

    assert len(told) > 10
    assert told <= known


@pytest.mark.parametrize("url", [*BROKERS[:2], "postgres://shop:secret@db.example/x?password=secret"])
def test_a_password_is_not_in_it(url: str) -> None:
    assert "secret" not in json.dumps(of(url))


async def test_the_api_shows_it(database_url: str) -> None:
    async with running(database_url, brokers=("postgres#payment_order",)) as house:
        shown = (await house.http.get("/asyncapi.json")).json()

    assert list(shown["channels"]) == ["payment_order", "answers"]
    assert shown["channels"]["payment_order"]["servers"] == [{"$ref": "#/servers/postgres"}]
