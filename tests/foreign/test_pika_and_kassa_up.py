"""A program on RabbitMQ whose author has never heard of Kassa: pika, the plainest declarations, a request and its answer."""

import json
import os
import re
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
from servers import Kafka, RabbitMQ

pytestmark = pytest.mark.needs("rabbitmq")

EVENTS = "kassa.events"

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "queues.md"
(PROGRAM,) = re.findall(r"```python\n(import json, pika\n.*?)```", GUIDE.read_text(), re.DOTALL)
"""As it is in the guide."""
WHOLE = PROGRAM + "print(properties.content_type, body.decode())\n"
"""It tells the rest of its answer, too."""


def virtual_host(rabbitmq: RabbitMQ) -> str:
    """A place where nothing is: the names of this program are fixed."""
    return rabbitmq.virtual_host(f"pika-{new_id()[-12:]}")


@pytest.fixture(scope="module")
def url(rabbitmq: RabbitMQ) -> str:
    return virtual_host(rabbitmq)


@pytest.fixture(scope="module")
def up(url: str) -> Iterator[Up]:
    with set_up() as directory:
        yield Up(directory, "--port", "0", "--broker", url)


def run(program: str, url: str, tmp_path: Path) -> str:
    """What the program says."""
    file = tmp_path / "program.py"
    assert program.count("amqp://…") == 1
    file.write_text(program.replace("amqp://…", url))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rest(up: Up, path: str) -> Any:
    """What the REST API says."""
    headers = {"Authorization": f"Bearer {up.said['api_key']}"}
    return httpx.get(up.said["api"] + path, headers=headers, trust_env=False, timeout=60).json()


def ask(url: str, tmp_path: Path, order_id: str = "123456") -> Any:
    """The payment that is the answer to the guide's program."""
    return json.loads(run(WHOLE.replace("123456", order_id), url, tmp_path).splitlines()[1].partition(" ")[2])


def test_the_program_of_the_guide_gets_its_answer(url: str, up: Up, tmp_path: Path) -> None:
    first = run(WHOLE, url, tmp_path)
    again = ask(url, tmp_path)

    said, rest_of_it = first.splitlines()
    content_type, _, body = rest_of_it.partition(" ")
    payment = json.loads(body)
    assert (payment["object"], payment["order_id"], payment["amount"], payment["currency"]) == (
        "payment", "123456", 100, "CNY",
    )  # fmt: skip
    assert payment["next_action"]["code_url"].startswith("weixin://")
    assert said == f"42 {payment['next_action']['code_url']}"
    assert content_type == "application/json"
    assert again == payment
    assert rest(up, "/v1/payments?order_id=123456")["data"] == [payment]


def test_a_program_that_wants_no_answer_pays_as_well(url: str, up: Up, tmp_path: Path) -> None:
    program = PROGRAM.replace("reply_to=answers, ", "").replace("123456", "7").partition("method,")[0]

    said = run(program, url, tmp_path)

    assert "reply_to" not in program and said == ""
    (payment,) = wait_until(lambda: rest(up, "/v1/payments?order_id=7")["data"])
    assert (payment["order_id"], payment["amount"]) == ("7", 100)


def test_a_plain_consumer_hears_events(url: str, up: Up, tmp_path: Path) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, "kassa.events", "payment.*")

    payment = ask(url, tmp_path, "8")
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
    rabbitmq: RabbitMQ, kafka: Kafka, tmp_path: Path
) -> None:
    url = virtual_host(rabbitmq)
    before = requests_at(kafka)
    with set_up() as directory:
        up = Up(directory, "--port", "0", "--broker", f"{url}#payment_order", "--broker", f"{kafka.url}#{EVENTS}")
        assert {name: one["topics"] for name, one in up.said["brokers"].items()} == {
            "rabbitmq": ["payment_order"], "kafka": [EVENTS],
        }  # fmt: skip
        with hearing(kafka) as consumer:
            payment = ask(url, tmp_path)
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
