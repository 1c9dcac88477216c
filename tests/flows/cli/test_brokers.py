"""Brokers on the command line."""

import json

from flows.cli.house import Up, kassa, set_up


def test_up_with_brokers_names_them_and_takes_requests_from_them() -> None:
    """Over PostgreSQL, which is always there; the real brokers are in flows/queues and foreign."""
    with set_up() as directory:
        up = Up(directory, "--port", "0", "--broker", "postgres#payment_order,shop.mails", "--broker", "memory")
        assert up.said["brokers"] == {
            "postgres": {"url": "postgres", "topics": ["payment_order", "shop.mails"]},
            "memory": {"url": "memory", "topics": ["kassa.events", "kassa.events.batch"]},
        }
        place = ["--dir", str(directory)]
        assert json.loads(kassa("queue", "asyncapi", *place).stdout)["asyncapi"] == "3.0.0"
        parts = {one["part"]: one for one in json.loads(kassa("doctor", "--json", *place).stdout)["checks"]}
        assert parts["broker postgres"]["level"] == "ok"
        said = json.loads(kassa("queue", "subscribe", "shop.mails", "mailer", "--json", *place).stdout)
        assert said == {"said": ["postgres: created: shop.mails:mailer"]}
        refused = kassa("queue", "subscribe", "nothing", "x", *place, expect=1)
        assert "No broker carries nothing" in refused.stderr
        assert up.stop()[0] == 0


def test_a_broker_that_does_not_exist_is_refused() -> None:
    with set_up() as directory:
        refused = kassa("up", "--dir", str(directory), "--broker", "carrier-pigeon://loft", expect=1)

    assert "There is no broker 'carrier-pigeon://loft'" in refused.stderr
