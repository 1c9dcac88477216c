"""What `kassa up` warns of at its start."""

from typing import Any, cast

import pytest

from kassa.app import App
from kassa.cli.up import _warn
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.brokers import Brokers
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.settings import Settings

RABBIT = "amqp://127.0.0.1"


@pytest.mark.parametrize(
    ("order_queue", "brokers", "warns"),
    [
        ("plain", (RABBIT,), True),
        ("plain", ("postgres#kassa.events", f"{RABBIT}?name=north#payment_order"), True),
        ("durable", (RABBIT,), False),
        ("passive", (RABBIT,), False),
        ("plain", ("postgres",), False),
        ("plain", (f"{RABBIT}#kassa.events", "postgres#payment_order"), False),
        ("plain", (), False),
    ],
)
def test_requests_that_rabbitmq_would_lose_at_a_restart_are_warned_of(
    order_queue: Any, brokers: tuple[str, ...], warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "a" * 43 + "="
    app = App(Settings(database_url="postgresql://nowhere/x", secrets_key=key, order_queue=order_queue))
    nowhere = cast(Any, None)
    app.brokers = Brokers(read_brokers(brokers), nowhere, nowhere, PAYMENT_ORDERS)

    _warn(app)

    said = capsys.readouterr().err
    assert ("do not survive a restart of RabbitMQ" in said and "KASSA_ORDER_QUEUE=durable" in said) is warns
    assert warns or said == ""
