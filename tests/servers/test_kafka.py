"""The project's Kafka, looked at through confluent-kafka."""

from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from servers import Kafka

WAIT_S = 60


def test_a_message_goes_in_and_comes_out_with_its_headers(kafka: Kafka) -> None:
    plain = {"bootstrap.servers": kafka.bootstrap}

    assert _echo(plain, b"a payment", [("id", b"1")]) == (b"a payment", [("id", b"1")])


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_over_tls_with_the_right_password(kafka: Kafka, mechanism: str) -> None:
    assert _echo(_secured(kafka, mechanism), b"a secret", []) == (b"a secret", None)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_over_tls_the_wrong_password_is_refused(kafka: Kafka, mechanism: str) -> None:
    errors = _errors({**_secured(kafka, mechanism), "sasl.password": "wrong"}, KafkaError._AUTHENTICATION)

    assert KafkaError._AUTHENTICATION in errors


def test_over_tls_a_stranger_is_not_trusted(kafka: Kafka) -> None:
    settings = _secured(kafka, "PLAIN")
    del settings["ssl.ca.location"]

    assert KafkaError._SSL in _errors(settings, KafkaError._SSL)


def test_topics_are_not_made_unasked(kafka: Kafka) -> None:
    topics = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(uuid4().hex, timeout=WAIT_S).topics

    assert [topic.error.code() for topic in topics.values() if topic.error] == [KafkaError.UNKNOWN_TOPIC_OR_PART]


def test_the_new_group_protocol_works(kafka: Kafka) -> None:
    plain = {"bootstrap.servers": kafka.bootstrap}

    assert _echo(plain, b"a payment", [], **{"group.protocol": "consumer"}) == (b"a payment", None)


def _secured(kafka: Kafka, mechanism: str) -> dict[str, Any]:
    return {
        "bootstrap.servers": kafka.tls_bootstrap,
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": mechanism,
        "sasl.username": kafka.username,
        "sasl.password": kafka.password,
        "ssl.ca.location": str(kafka.certificates.authority),
    }


def _echo(
    settings: dict[str, Any], body: bytes, headers: list[tuple[str, str | bytes | None]], **group: str
) -> tuple[Any, Any]:
    """Through a topic of its own and a consumer group."""
    topic = uuid4().hex
    admin = AdminClient(settings)
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    producer = Producer(settings)
    producer.produce(topic, body, headers=headers)
    producer.flush()
    consumer = Consumer({**settings, **group, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    message = consumer.poll(WAIT_S)
    consumer.close()
    assert message is not None and not message.error()
    return message.value(), message.headers()


def _errors(settings: dict[str, Any], expected: int) -> set[int]:
    """What a client complains of, until it is what was expected; a busy server also cuts connections."""
    found: set[int] = set()
    complaining: dict[str, Any] = {**settings, "error_cb": lambda error: found.add(error.code())}
    admin = AdminClient(complaining)
    for _ in range(60):
        if expected in found:
            break
        admin.poll(0.1)
        with pytest.raises(KafkaException):
            admin.list_topics(timeout=0.5)
    return found
