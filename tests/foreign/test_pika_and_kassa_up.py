"""A program on RabbitMQ whose author has never heard of Kassa: pika, the plainest declarations, a request and its answer."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pika
import pytest
from confluent_kafka import Consumer, TopicPartition

from flows.cli.house import ANSWER_S, Up, kassa_process, set_up, wait_until
from kassa.ids import new_id
from servers import Kafka

pytestmark = pytest.mark.needs("rabbitmq")

EVENTS = "kassa.events"

PROGRAM = """
import json, sys, pika
connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
channel.exchange_declare("payment", "topic")
channel.queue_declare("payment_order")
channel.queue_bind("payment_order", "payment", "payment_order")
answers = channel.queue_declare("", exclusive=True).method.queue
properties = pika.BasicProperties(reply_to=answers, correlation_id="42")
channel.basic_publish("payment", "payment_order", json.dumps({"order_id": "123456", "amount": 100}), properties)
method, properties, body = next(channel.consume(answers, inactivity_timeout=100))
print(properties.correlation_id, properties.content_type, body.decode())
"""


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A virtual host of its own: the names of this program are fixed."""
    return str(request.getfixturevalue("rabbitmq").virtual_host(f"pika-{new_id()[-12:]}"))


@pytest.fixture
def up(url: str) -> Iterator[Up]:
    with set_up() as directory:
        yield Up(directory, "--port", "0", "--broker", url)


def run(program: str, url: str, tmp_path: Path) -> str:
    """What the program says."""
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, str(file), url], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rest(up: Up, path: str) -> Any:
    """What the REST API says."""
    headers = {"Authorization": f"Bearer {up.said['api_key']}"}
    return httpx.get(up.said["api"] + path, headers=headers, trust_env=False, timeout=60).json()


def test_a_program_of_ten_lines_gets_its_answer(url: str, up: Up, tmp_path: Path) -> None:
    first = run(PROGRAM, url, tmp_path)
    again = run(PROGRAM, url, tmp_path)
    silent = run(
        PROGRAM.replace("reply_to=answers, ", "").replace("123456", "7").partition("method,")[0], url, tmp_path
    )

    correlation_id, content_type, body = first.split(" ", 2)
    payment = json.loads(body)
    assert (correlation_id, content_type, silent) == ("42", "application/json", "")
    assert (payment["object"], payment["order_id"], payment["amount"], payment["currency"]) == (
        "payment", "123456", 100, "CNY",
    )  # fmt: skip
    assert payment["next_action"]["code_url"].startswith("weixin://")
    assert json.loads(again.split(" ", 2)[2]) == payment
    assert rest(up, "/v1/payments?order_id=123456")["data"] == [payment]


def test_a_plain_consumer_hears_events(url: str, up: Up, tmp_path: Path) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, "kassa.events", "payment.*")

    payment = json.loads(run(PROGRAM, url, tmp_path).split(" ", 2)[2])
    with up.client() as client:
        up.pay(client.payments.get(payment["id"]))
    heard: list[tuple[str, dict[str, Any]]] = []
    for method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=100):
        heard.append((method.routing_key, json.loads(body)))
        assert properties.headers["ce-subject"] == payment["id"]
        if method.routing_key == "payment.succeeded":
            break
    connection.close()

    assert [type_ for type_, _ in heard] == ["payment.processing", "payment.succeeded"]
    assert heard[-1][1]["state"] == "succeeded"


@contextmanager
def hearing(kafka: Kafka) -> Iterator[Consumer]:
    """A plain consumer of events, from now on."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": new_id()})
    partitions = consumer.list_topics(EVENTS, timeout=ANSWER_S).topics[EVENTS].partitions
    ends = {number: consumer.get_watermark_offsets(TopicPartition(EVENTS, number))[1] for number in partitions}
    consumer.assign([TopicPartition(EVENTS, number, end) for number, end in ends.items()])
    try:
        yield consumer
    finally:
        consumer.close()


def next_of(consumer: Consumer, payment_id: str) -> Any:
    """The next event, if it is one of this payment's."""
    event = consumer.poll(1.0)
    is_ours = event is not None and ("ce_subject", payment_id.encode()) in (event.headers() or ())
    return event if is_ours else None


def requests_at(kafka: Kafka) -> int | None:
    """How many requests ever came there; None: there is no topic for them. The server is shared with other tests."""
    with closing(Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": new_id()})) as consumer:
        topic = consumer.list_topics(timeout=ANSWER_S).topics.get("payment_order")
        if topic is None:
            return None
        return sum(consumer.get_watermark_offsets(TopicPartition(topic.topic, one))[1] for one in topic.partitions)


def test_rabbitmq_takes_requests_and_kafka_tells_events_and_neither_has_the_others_topic(
    url: str, kafka: Kafka, tmp_path: Path
) -> None:
    before = requests_at(kafka)
    with set_up() as directory:
        up = Up(directory, "--port", "0", "--broker", f"{url}#payment_order", "--broker", f"{kafka.url}#{EVENTS}")
        assert {name: one["topics"] for name, one in up.said["brokers"].items()} == {
            "rabbitmq": ["payment_order"], "kafka": [EVENTS],
        }  # fmt: skip
        with hearing(kafka) as consumer:
            payment = json.loads(run(PROGRAM, url, tmp_path).split(" ", 2)[2])
            event = wait_until(lambda: next_of(consumer, payment["id"]))

    assert (payment["object"], payment["order_id"]) == ("payment", "123456")
    assert dict(event.headers())["ce_type"] == b"payment.processing"
    assert json.loads(event.value())["order_id"] == "123456"
    with (
        closing(pika.BlockingConnection(pika.URLParameters(url))) as connection,
        pytest.raises(pika.exceptions.ChannelClosedByBroker, match="no exchange"),
    ):
        connection.channel().exchange_declare(EVENTS, passive=True)
    assert requests_at(kafka) == before


def test_a_broker_that_cannot_be_reached_is_told_at_once() -> None:
    with set_up() as directory:
        done = kassa_process(
            "up", "--dir", str(directory), "--port", "0", "--broker", "amqp://guest:pw@127.0.0.1:1", expect=3
        )

    assert "amqp://guest:***@127.0.0.1:1 cannot be reached" in done.stderr
    assert "Start it, or correct its URL" in done.stderr
    assert "guest:pw" not in done.stderr
