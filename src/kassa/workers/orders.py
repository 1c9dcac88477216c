"""Takes requests from the queue payment_order of a broker: many at once, each settled when its effect and answer are durable."""

import asyncio
import math
import random

import structlog
from msgspec.structs import replace

from kassa.api.queue import Handled, MerchantUnclear, QueueDoor
from kassa.db.away import AWAY
from kassa.errors import BrokerUnreachable, KassaError, Retry
from kassa.merchants.orders import MEND, SETTING
from kassa.messaging.binder import Binder, Subscription
from kassa.messaging.brokers import Broker
from kassa.messaging.ladder import message_delay
from kassa.messaging.model import Ack, Dead, Delivery, RetryAfter, Settlement
from kassa.messaging.packing import VIA
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.supervisor import end_tasks, is_ended, said
from kassa.workers.relay import opened

IN_FLIGHT_MAX = 256
"""Requests at once. Nearly all of that time is waiting for channels and commits."""
BATCH = 100
WAIT_S = 5.0
PAUSE_S = 1.0
"""While the broker is away, and before a request that could not be taken now is tried again."""
DRAIN_S = 5.0
WARN_S = 300.0
"""While nobody can say whose payments the requests are, the log says so this often."""

log = structlog.get_logger("kassa.workers.orders")


class OrderWorker:
    """One consumer of payment_order on one broker. Several, in any number of processes, share the requests."""

    def __init__(self, broker: Broker, door: QueueDoor) -> None:
        self._broker = broker
        self._door = door
        self._running: set[asyncio.Task[None]] = set()
        self._ended: list[tuple[Delivery, Settlement]] = []
        self._has_ended = asyncio.Event()
        self._is_unclear = False
        """Whether somebody met MerchantUnclear since the subscription was made."""

    async def run(self) -> None:
        """For ever. What is in hand when it is cancelled and does not end soon comes again elsewhere."""
        binder = await opened(self._broker)
        while True:
            await self._merchant()
            await self._take(binder)

    async def _merchant(self) -> None:
        """Returns when it is clear whose payments the requests are. Until then nobody is subscribed: they stay where they are, in
        their order, however many and however long, and no try is counted."""
        clock = asyncio.get_running_loop().time
        warned_at = -math.inf
        while True:
            try:
                await self._door.look()
            except MerchantUnclear as error:
                if clock() - warned_at >= WARN_S:
                    log.warning("orders.wait", broker=self._broker.name, setting=SETTING, reason=str(error), do=MEND)
                    warned_at = clock()
                await asyncio.sleep(PAUSE_S)
            else:
                if warned_at > -math.inf:
                    log.info("orders.go_on", broker=self._broker.name)
                return

    async def _take(self, binder: Binder) -> None:
        """Until it is unclear whose payments the requests are; what is in hand then comes again."""
        (group,) = PAYMENT_ORDERS.groups
        subscription = await binder.subscribe(PAYMENT_ORDERS.name, group)
        self._is_unclear = False
        # What ended without being settled in an earlier run comes again.
        self._ended.clear()
        settling = asyncio.create_task(self._settle_for_ever(subscription), name="settle orders")
        try:
            while not settling.done():
                if self._is_unclear:
                    return
                await self._step(subscription)
            await settling
        finally:
            await asyncio.shield(self._drain(subscription, settling))

    async def _step(self, subscription: Subscription) -> None:
        room = IN_FLIGHT_MAX - len(self._running)
        if room <= 0:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            return
        try:
            deliveries = await subscription.receive(min(room, BATCH), WAIT_S)
        except BrokerUnreachable as error:
            self._broker.is_away(str(error))
            await asyncio.sleep(PAUSE_S)
            return
        if deliveries:
            self._broker.is_back()
        is_alone = any(one.alone for one in deliveries)
        if is_alone:
            # Should it end this process, nobody else is to be taken for what did.
            await self._finish(subscription)
        for delivery in deliveries:
            task = asyncio.create_task(self._handle(delivery), name="order")
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        if is_alone:
            await self._finish(subscription)

    async def _finish(self, subscription: Subscription) -> None:
        """What is in hand, to its end."""
        if self._running:
            await asyncio.wait(self._running)
        await self._settle(subscription)

    async def _handle(self, delivery: Delivery) -> None:
        via = delivery.record.headers.get(VIA, self._broker.name)
        try:
            handled = await self._door.handle(delivery.record, via)
        except MerchantUnclear:
            # Not settled, so that it is neither a try nor put behind those that nobody has taken yet.
            self._is_unclear = True
            return
        except AWAY as error:
            handled = Handled(retry=f"the database is away ({type(error).__name__})")
        except KassaError as error:
            handled = Handled(fault=str(error)) if error.retry is Retry.NEVER else Handled(retry=str(error))
        except asyncio.CancelledError:
            if is_ended():
                raise
            handled = Handled(retry="what it waited for was stopped")
        except Exception as error:
            # The outermost place for this request: what its handling could not bear belongs to it, and must not end the loop.
            log.exception("order.crashed", record=delivery.record.id)
            handled = Handled(fault=said(error))
        self._ended.append((_marked(delivery, via), _settlement(delivery, handled)))
        self._has_ended.set()

    async def _settle_for_ever(self, subscription: Subscription) -> None:
        """What ended meanwhile is settled together."""
        while True:
            await self._has_ended.wait()
            await self._settle(subscription)

    async def _settle(self, subscription: Subscription) -> None:
        self._has_ended.clear()
        ended, self._ended = self._ended, []
        if ended:
            await subscription.settle(ended)

    async def _drain(self, subscription: Subscription, settling: "asyncio.Task[None]") -> None:
        """Whatever becomes of what ended, nobody goes on consuming here: the next one to run is a consumer by itself."""
        try:
            if self._running:
                await asyncio.wait(self._running, timeout=DRAIN_S)
            await end_tasks(settling)
            await self._settle(subscription)
        finally:
            await self._leave(subscription)

    async def _leave(self, subscription: Subscription) -> None:
        for task in self._running:
            task.cancel()
        try:
            await subscription.close(0.0)
        finally:
            # Channels that were asked have answered, or said nothing for too long, before what they use is gone.
            await self._door.stop()


def _marked(delivery: Delivery, via: str) -> Delivery:
    """Should it have to wait, its answer goes back over the broker that it came by, whoever takes it up again."""
    record = delivery.record
    return replace(delivery, record=replace(record, headers={**record.headers, VIA: via}))


def _settlement(delivery: Delivery, handled: Handled) -> Settlement:
    if handled.problem is not None:
        return Dead(handled.problem)
    if handled.retry is not None:
        return RetryAfter(PAUSE_S, handled.retry, counts=False)
    if handled.fault is not None:
        delay_s = message_delay(delivery.attempts + 1, random.random())
        return Dead(handled.fault) if delay_s is None else RetryAfter(delay_s, handled.fault)
    return Ack()
