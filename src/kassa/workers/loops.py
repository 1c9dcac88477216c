"""All loops of Kassa by name, made of an App: what `kassa worker NAME…` can run, and what `kassa up` runs beside the API."""

from collections.abc import Iterable
from datetime import timedelta
from functools import partial

from kassa.api.queue import QueueDoor
from kassa.app import App
from kassa.errors import SettingInvalid
from kassa.messaging import topology
from kassa.messaging.log import LogGroup
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.wake import TIMERS
from kassa.notifications.model import DISPATCH_GROUP
from kassa.settings import anchor_key
from kassa.supervisor import Loop, Supervisor
from kassa.workers.events import read_for_ever
from kassa.workers.orders import OrderWorker
from kassa.workers.payments import PaymentWorker, sweep_for_ever
from kassa.workers.relay import prepare, relays
from kassa.workers.timers import TimerLoop
from kassa.workers.upkeep import anchor_for_ever, drop_for_ever, release_for_ever
from kassa.workers.webhooks import Dispatcher, WebhookWorker

NAMES = ("payments", "sweeper", "dispatcher", "webhooks", "holds", "retention", "anchors", "relay", "orders")
"""payments: channels, expiry, late money · sweeper: what nobody would look at again · dispatcher: events to deliveries ·
webhooks: deliveries to merchants · holds: expired reservations · retention: old answers · anchors: signed heads ·
relay: events, messages and answers to the brokers · orders: requests from the brokers."""

BROKER_WORKERS = ("relay", "orders")
"""They may stand still while their broker is away; payments over the API do not notice."""


def supervisor(app: App, names: Iterable[str] = NAMES) -> Supervisor:
    """The loops of these names, not yet started. Raises SettingInvalid for a name that does not exist.

    Several processes may run the same loops: leases and groups share the work out.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise SettingInvalid(f"There is no worker {unknown[0]!r}; these are: {', '.join(NAMES)}.", name="worker")
    loops = _loops(app) | _broker_loops(app)
    return Supervisor({name: loop for name, loop in loops.items() if worker_of(name) in wanted})


def worker_of(loop: str) -> str:
    """The worker that a loop belongs to: `relay rabbitmq kafka.events` is one of `relay`."""
    return loop.partition(" ")[0]


def idle_workers(beside: Supervisor) -> list[str]:
    """Loops that should run and do not, those aside that need a broker."""
    return [worker.name for worker in beside.idle if worker_of(worker.name) not in BROKER_WORKERS]


async def prepare_brokers(app: App) -> None:
    """Before the first event: what is to reach a broker is kept for it from now on."""
    await prepare(app)


def _broker_loops(app: App) -> dict[str, Loop]:
    loops: dict[str, Loop] = {}
    for broker in app.brokers:
        loops |= {f"relay {broker.name} {name}": loop for name, loop in relays(app, broker).items()}
    receiving = app.brokers.of_topic(PAYMENT_ORDERS.name)
    if receiving:
        # A door each: one that stops waits for its own conversations, and ends no others.
        loops |= {f"orders {broker.name}": OrderWorker(broker, QueueDoor(app)).run for broker in receiving}
    return loops


def _loops(app: App) -> dict[str, Loop]:
    handled = partial(app.metrics.delivery_handled, topology.EVENTS.name, DISPATCH_GROUP)
    dispatcher = Dispatcher(app.journal, app.webhook_store, app.clock, observe=handled)
    webhooks = WebhookWorker(
        app.journal, app.webhook_store, app.events, app.webhooks, app.webhook_sender, app.timers, app.clock,
        observe=app.metrics.webhook_tried,
    )  # fmt: skip
    loops: dict[str, Loop] = {
        "payments": PaymentWorker(app.timers, app.payments, app.payments_store, app.wakeups.watch(TIMERS)).run,
        "sweeper": partial(sweep_for_ever, app.payments_store, app.payments),
        "dispatcher": partial(
            read_for_ever,
            LogGroup(app.pool, DISPATCH_GROUP),
            dispatcher.handle,
            app.wakeups,
            concern=app.webhook_store.is_any_enabled,
        ),
        "webhooks": TimerLoop(app.timers, app.wakeups, webhooks.handlers).run,
        "holds": partial(release_for_ever, app.pool, app.journal),
        "retention": partial(drop_for_ever, app.pool, timedelta(days=app.settings.idempotency_keep_days)),
    }
    key = anchor_key(app.settings)
    if key is not None:
        loops["anchors"] = partial(anchor_for_ever, app.pool, key, app.clock)
    return loops
