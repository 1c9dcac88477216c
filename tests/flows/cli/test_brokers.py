"""Brokers on the command line."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

from flows.cli.house import ANSWER_S, PROGRAM, Up, environment, kassa, kassa_process, set_up, wait_until


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with set_up() as directory:
        run = Up(directory, "--port", "0", "--broker", "postgres")
        yield run
        assert run.stop()[0] == 0


def test_up_with_brokers_names_them_and_takes_requests_from_them() -> None:
    """Over PostgreSQL, which is always there; the real brokers are in flows/queues and foreign."""
    with set_up() as directory:
        up = Up(directory, "--port", "0", "--broker", "postgres#payment_order,shop.mails", "--broker", "memory")
        assert up.said["brokers"] == {
            "postgres": {"url": "postgres", "topics": ["payment_order", "shop.mails"]},
            "memory": {"url": "memory", "topics": ["kassa.events", "kassa.events.batch"]},
        }
        place = ["--dir", str(directory)]
        (line,) = kassa("queue", "asyncapi", "--json", *place).stdout.splitlines()
        assert json.loads(line) == json.loads(kassa("queue", "asyncapi", *place).stdout)
        assert json.loads(line)["asyncapi"] == "3.0.0"
        doctor = json.loads(kassa("doctor", "--json", *place).stdout)
        assert {one["part"]: one["level"] for one in doctor["checks"]}["broker postgres"] == "ok"
        settings = {one["name"]: (one["shown"], one["source"]) for one in doctor["settings"]}
        remembered = str(directory / "up.json")
        assert settings["brokers"] == ("postgres#payment_order,shop.mails memory", remembered)
        assert settings["order_queue"] == ("plain", remembered)
        said = json.loads(kassa("queue", "subscribe", "shop.mails", "mailer", "--json", *place).stdout)
        assert said == {"said": ["postgres: created: shop.mails:mailer"]}
        refused = kassa("queue", "subscribe", "nothing", "x", *place, expect=1)
        assert "No broker carries nothing" in refused.stderr
        (directory / "kassa.toml").write_text('broker_topology = "verify"\n')
        elsewhere = ["--broker", "memory", *place]
        lacking = kassa("queue", "subscribe", "kassa.events", "shop", *elsewhere, expect=1)
        assert "broker_topology is `verify`" in lacking.stderr
        assert up.stop()[0] == 0


def test_a_broker_that_does_not_exist_is_refused() -> None:
    with set_up() as directory:
        refused = kassa_process("up", "--dir", str(directory), "--broker", "carrier-pigeon://loft", expect=1)

    assert "There is no broker 'carrier-pigeon://loft'" in refused.stderr


def test_queues_are_operated_from_the_command_line(up: Up) -> None:
    place = ["--dir", str(up.said["dir"])]
    name = "payment_order:kassa"

    def read(*arguments: str) -> Any:
        return json.loads(kassa("queue", *arguments, *place, "--json").stdout)

    def queue() -> Any:
        return next(one for one in read("list")["data"] if one["name"] == name)

    assert {one["kind"] for one in read("list")["data"]} == {"group", "outbox", "log"}
    assert read("pause", name) == {"name": name, "paused": True}
    assert queue()["paused"] is True
    send(up.said["database"], '{"order_id": "waits", "amount": 100}')
    (record,) = read("peek", name)["data"]
    assert json.loads(record["body"]) == {"order_id": "waits", "amount": 100}
    assert "waits" in kassa("queue", "peek", name, *place).stdout

    assert "--yes" in kassa("queue", "purge", name, *place, expect=2).stderr
    assert queue()["waiting"] == 1
    assert read("purge", name, "--yes") == {"gone": 1, "left": 0}
    assert read("resume", name) == {"name": name, "paused": False}

    send(up.said["database"], '{"order_id": "", "amount": 100}')
    dead = wait_until(lambda: read("dead", name)["data"])
    assert "order_id" in dead[0]["reason"]
    assert "order_id" in kassa("queue", "dead", name, *place).stdout
    assert read("replay", name, dead[0]["id"]) == {"replayed": 1}
    watched = wait_until(lambda: handled(read("watch", "--once")["data"]))
    assert watched["dead"] == 1
    assert name in kassa("queue", "watch", "--once", *place).stdout

    told = kassa("queue", "peek", "payment_orders", *place, expect=1).stderr
    assert f"There are: {name}" in told
    assert "kassa worker relay" in kassa("queue", "pause", "replies:postgres", *place, expect=1).stderr
    assert "webhooks" in kassa("queue", "purge", "webhooks", "--yes", *place, expect=1).stderr


def handled(lines: Any) -> Any:
    """The queue's line, once its process has told that it handled something."""
    return next((line for line in lines if line["name"] == "payment_order:kassa" and line["dead"]), None)


def send(database_url: str, body: str) -> None:
    """A request by SQL alone."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT kassa_send('payment_order', %s)", (body,))


def test_operators_have_keys_of_their_own_and_workers_tell_their_numbers(up: Up) -> None:
    place = ["--dir", str(up.said["dir"])]
    made = json.loads(kassa("key", "create", "--operator", "--label", "night", *place, "--json").stdout)
    assert made["scopes"] == "operator"
    (listed,) = json.loads(kassa("key", "list", "--operator", *place, "--json").stdout)["data"]
    assert listed["id"] == made["id"]
    queues = up.get("/v1/queues", made["key"])
    assert queues.status_code == 200 and queues.json()["data"]
    theirs = up.get("/v1/queues", up.said["api_key"])
    assert theirs.status_code == 403
    assert kassa("key", "create", "--operator", "--merchant", up.said["merchant"], *place, expect=2).returncode == 2

    worker = subprocess.Popen(
        [*PROGRAM, "worker", "relay", "orders", "--broker", "postgres", "--metrics-port", "0", *place],
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert worker.stderr is not None
        said = next(line for line in worker.stderr if "/metrics" in line)
        page = httpx.get(said.split()[-1], timeout=ANSWER_S).text
        assert 'kassa_broker_up{broker="postgres"} 1.0' in page
        assert 'kassa_queue_length{group="kassa",topic="payment_order"} 0.0' in page
    finally:
        worker.terminate()
        assert worker.wait(timeout=ANSWER_S) == 0
        if worker.stderr is not None:
            worker.stderr.close()
    revoked = json.loads(kassa("key", "revoke", made["id"], *place, "--json").stdout)
    assert revoked["state"] == "revoked"
