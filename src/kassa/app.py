"""The composition root: Settings in, a running App out. Nothing else builds things."""

import asyncio
import gc
from typing import Any

import asyncpg
import structlog

from kassa.channels.registry import open_channel
from kassa.channels.runner import Runner
from kassa.clock import Clock, SystemClock
from kassa.db.pool import close_pool, connect, open_pool
from kassa.errors import KassaError, SettingInvalid
from kassa.ids import Id
from kassa.journal.writer import ANSWER_S, PostgresJournal
from kassa.ledger.store import LedgerStore
from kassa.merchants.directory import CHANGES, Directory
from kassa.merchants.service import Merchants
from kassa.merchants.store import MerchantStore
from kassa.merchants.vault import Vault
from kassa.messaging.activity import Publisher
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.brokers import Brokers
from kassa.messaging.log import EventLog
from kassa.messaging.queues import Queues
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import TimerWork
from kassa.notifications.sender import Sender
from kassa.notifications.service import Webhooks
from kassa.notifications.store import WebhookStore
from kassa.observability.metrics import Metrics
from kassa.payments.service import Payments
from kassa.payments.store import PaymentStore
from kassa.payments.timeline import Delivery, Timeline
from kassa.settings import Settings, secrets_key
from kassa.supervisor import Supervisor
from kassa.tables import TABLES

LISTEN_PAUSE_S = 1.0
"""Before listening again after the connection was lost. Nothing depends on it: everybody who listens also looks."""

log = structlog.get_logger("kassa.app")


class App:
    """All parts, built from Settings. `start` before use; `stop` finishes what was begun.

    Settings must name a database; it is migrated already. Raises SettingInvalid.
    """

    pool: Any
    journal: PostgresJournal
    wakeups: Wakeups
    directory: Directory
    merchants: Merchants
    ledger: LedgerStore
    payments_store: PaymentStore
    runner: Runner
    payments: Payments
    events: EventLog
    timers: TimerWork
    webhook_store: WebhookStore
    webhook_sender: Sender
    webhooks: Webhooks
    timeline: Timeline
    brokers: Brokers
    queues: Queues
    activity: Publisher

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        if settings.database_url is None:
            raise SettingInvalid(
                "No database is named: set KASSA_DATABASE_URL, or use `kassa up`.", name="database_url"
            )
        self.settings = settings
        self.database_url = settings.database_url
        self.clock = clock or SystemClock()
        self.vault = Vault(secrets_key(settings))
        self.metrics = Metrics()
        self.order_merchant = settings.order_merchant
        """Whose payments come over the queue; `kassa up` says it when it has a merchant."""
        self._named_brokers = read_brokers(settings.brokers)
        self._background = Supervisor({})

    async def start(self) -> None:
        """Connects and builds. Raises DatabaseUnreachable, DatabaseRefused."""
        settings = self.settings
        self.pool = await open_pool(
            self.database_url, application="kassa", size_min=settings.pool_min, size_max=settings.pool_max
        )
        self.journal = PostgresJournal(
            lambda: connect(self.database_url, application="kassa journal", answer_s=ANSWER_S),
            TABLES,
            clock=self.clock,
            lanes=settings.journal_lanes,
            batch_max=settings.journal_batch_max,
            queue_max=settings.journal_queue_max,
            observe=self.metrics.journal_committed,
        )
        await self.journal.start()
        self._build()
        await self.webhook_sender.start()
        self._background = Supervisor({
            "wakeups": self.wakeups.run,
            "directory": self.directory.run,
            "configuration": self._listen,
            "activity": self.activity.run,
        })  # fmt: skip
        self._background.start()
        # What was built stays for good; collecting it again and again cost 7 % of the time of a payment.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)

    def _build(self) -> None:
        settings, pool = self.settings, self.pool
        merchants = MerchantStore(pool)
        self.wakeups = Wakeups(lambda: connect(self.database_url, application="kassa wakeups"))
        self.wakeups.follow(self.journal)
        self.ledger = LedgerStore(pool)
        self.directory = Directory(merchants, self.vault, open_channel)
        self.merchants = Merchants(self.journal, merchants, self.directory, self.vault, self.ledger.currencies)
        self.payments_store = PaymentStore(pool)
        self.runner = Runner()
        self.payments = Payments(
            self.journal, self.payments_store, self.directory, self.runner, self.clock, settings.base_url,
            observe=self.metrics.channel_called,
        )  # fmt: skip
        self.events = EventLog(pool)
        self.timers = TimerWork(pool)
        self.webhook_store = WebhookStore(pool)
        self.webhook_sender = Sender(allow_private=settings.webhook_allow_private)
        self.timeline = Timeline(pool, self._deliveries)
        self.brokers = Brokers(
            self._named_brokers,
            pool,
            self.wakeups,
            PAYMENT_ORDERS._replace(declaration=settings.order_queue or "durable"),
            topology=settings.broker_topology,
            meters=self.metrics.meters,
        )
        self.queues = Queues(pool, self.brokers, self.wakeups)
        self.activity = Publisher(pool, self.metrics.meters)
        self.webhooks = Webhooks(
            self.journal,
            self.webhook_store,
            self.events,
            self.vault,
            self.clock,
            allow_private=settings.webhook_allow_private,
        )

    @property
    def idle(self) -> list[str]:
        """Loops of the App itself that should run and do not."""
        return [loop.name for loop in self._background.idle]

    async def stop(self) -> None:
        """Lets conversations and commits end, then lets go of everything."""
        await self._background.stop()
        await self.brokers.close()
        await self.payments.stop()
        await self.runner.close()
        await self.webhook_sender.close()
        await self.journal.stop()
        await close_pool(self.pool)

    async def _deliveries(self, home: int, root: Id) -> list[Delivery]:
        """What of a payment's story reached the merchant, in the words of the timeline."""
        return [
            Delivery(
                one.last_at or one.created_at,
                one.event,
                one.event_type,
                f"whe_{one.endpoint}",
                one.state,
                one.tries,
                one.last_status,
                one.last_error,
            )
            for one in await self.webhook_store.of_root(home, root)
        ]

    async def _listen(self) -> None:
        """Hears from other processes that a merchant changed. Only makes it quicker: the directory looks by itself."""
        while True:
            try:
                connection = await connect(self.database_url, application="kassa configuration")
            except KassaError as error:
                log.warning("configuration.unreachable", reason=error.code)
                await asyncio.sleep(LISTEN_PAUSE_S)
                continue
            try:
                await connection.add_listener(CHANGES, lambda _c, _p, _n, payload: self.directory.heard(payload))
                while not connection.is_closed():
                    # Asking shows a connection that is only half there.
                    await connection.execute("SELECT 1")
                    await asyncio.sleep(LISTEN_PAUSE_S)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("configuration.lost", reason=type(error).__name__)
            finally:
                connection.terminate()
