"""Which brokers there are: one file that speaks a broker's protocol (`transport.py`) and one line here.

Everything else is the same for all of them.
"""

from collections.abc import Callable
from importlib import import_module
from urllib.parse import urlsplit

from kassa.errors import SettingInvalid
from kassa.messaging.binder import Binder, Resources
from kassa.messaging.metered import MeteredBinder

REGISTRY = {
    "amqp": "kassa.messaging.binders.rabbitmq",
    "amqps": "kassa.messaging.binders.rabbitmq",
    "kafka": "kassa.messaging.binders.kafka",
    "kafka+ssl": "kassa.messaging.binders.kafka",
    "memory": "kassa.messaging.binders.memory",
    "postgres": "kassa.messaging.binders.postgres",
    "rocketmq": "kassa.messaging.binders.rocketmq",
    "zeromq": "kassa.messaging.binders.zeromq",
}
"""URL scheme, or its bare name, to the module whose `make_binder(url, resources)` makes the binder."""


def make_binder(url: str, resources: Resources) -> Binder:
    """The binder for `postgres`, `amqp://…`, `kafka://…`. `resources`: what it needs of this process.

    Raises SettingInvalid for a broker that Kassa does not know, or a URL that its file cannot read.
    """
    scheme = urlsplit(url).scheme or url
    module = REGISTRY.get(scheme)
    if module is None:
        known = ", ".join(sorted(REGISTRY))
        raise SettingInvalid(f"There is no broker {scheme!r}; these are: {known}.", broker=scheme)
    make: Callable[[str, Resources], Binder] = import_module(module).make_binder
    binder = make(url, resources)
    return binder if resources.meters is None else MeteredBinder(binder, resources.meters)
