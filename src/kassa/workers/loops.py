"""All loops of Kassa by name, made of an App: what `kassa worker NAME…` can run, and what `kassa up` runs beside the API."""

from collections.abc import Iterable
from datetime import timedelta
from functools import partial

from kassa.app import App
from kassa.errors import SettingInvalid
from kassa.messaging.log import LogGroup
from kassa.messaging.wake import TIMERS
from kassa.settings import anchor_key
from kassa.workers.events import read_for_ever
from kassa.workers.payments import PaymentWorker, sweep_for_ever
from kassa.workers.supervisor import Loop, Supervisor
from kassa.workers.timers import TimerLoop
from kassa.workers.upkeep import anchor_for_ever, drop_for_ever, release_for_ever
from kassa.workers.webhooks import Dispatcher, WebhookWorker

NAMES = ("payments", "sweeper", "dispatcher", "webhooks", "holds", "retention", "anchors")
"""payments: channels, expiry, late money · sweeper: what nobody would look at again · dispatcher: events to deliveries ·
webhooks: deliveries to merchants · holds: expired reservations · retention: old answers · anchors: signed heads."""

WEBHOOKS_GROUP = "webhooks"


def supervisor(app: App, names: Iterable[str] = NAMES) -> Supervisor:
    """The loops of these names, not yet started. Raises SettingInvalid for a name that does not exist.

    Several processes may run the same loops: leases and groups share the work out.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise SettingInvalid(f"There is no worker {unknown[0]!r}; these are: {', '.join(NAMES)}.", name="worker")
    loops = _loops(app)
    return Supervisor({name: loops[name] for name in wanted if name in loops})


def _loops(app: App) -> dict[str, Loop]:
    dispatcher = Dispatcher(app.journal, app.webhook_store, app.clock)
    webhooks = WebhookWorker(
        app.journal, app.webhook_store, app.events, app.webhooks, app.webhook_sender, app.timers, app.clock
    )
    loops: dict[str, Loop] = {
        "payments": PaymentWorker(app.timers, app.payments, app.wakeups.watch(TIMERS)).run,
        "sweeper": partial(sweep_for_ever, app.payments_store, app.payments),
        "dispatcher": partial(read_for_ever, LogGroup(app.pool, WEBHOOKS_GROUP), dispatcher.handle, app.wakeups),
        "webhooks": TimerLoop(app.timers, app.wakeups, webhooks.handlers).run,
        "holds": partial(release_for_ever, app.pool, app.journal),
        "retention": partial(drop_for_ever, app.pool, timedelta(days=app.settings.idempotency_keep_days)),
    }
    key = anchor_key(app.settings)
    if key is not None:
        loops["anchors"] = partial(anchor_for_ever, app.pool, key, app.clock)
    return loops
