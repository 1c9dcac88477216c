"""The world of one seed: shops that ask, payers that pay, workers that are late, crashes; then quiet, and the reckoning."""

import asyncio
import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import Any

import msgspec
import structlog

from kassa.errors import (
    AttemptInDoubt,
    IdempotencyKeyReused,
    KassaError,
    OutcomeUnknown,
    PaymentNotClosable,
    PaymentNotHeld,
    PaymentNotPayable,
    PaymentOrderExists,
    RefundExceedsPaid,
    RefundInsufficientBalance,
    RefundNotRefundable,
    WalletInsufficientFunds,
)
from kassa.ids import Id
from kassa.journal.change import AccountOpen, Change, OnceKey
from kassa.journal.memory import MemoryJournal, StoredTimer
from kassa.journal.table import Tables
from kassa.ledger import chart
from kassa.ledger.model import Limit
from kassa.merchants.records import API_KEY, CHANNEL_ACCOUNT, MERCHANT, Merchant
from kassa.payments.memory import MemoryPayments
from kassa.payments.model import Order, Way
from kassa.payments.records import ATTEMPT, EXCHANGE, PAYMENT, REFUND, WALLET, Attempt, Payment, Refund
from kassa.payments.refunds import Ask
from kassa.payments.service import Answer, Payments
from kassa.simulation.channel import Said
from kassa.simulation.door import Door
from kassa.simulation.invariants import PAID, Checker
from kassa.simulation.line import CALLBACK_PAUSES_S, Line, lies
from kassa.simulation.provider import Provider
from kassa.simulation.report import Report
from kassa.simulation.virtual import VirtualClock, VirtualLoop, seeded_ids

TABLES = Tables((MERCHANT, API_KEY, CHANNEL_ACCOUNT, PAYMENT, ATTEMPT, REFUND, WALLET, EXCHANGE))
CURRENCY = "CNY"
CHANNELS = ("wechat", "second")
STEPS = 40
"""How many things happen in a world unless it is said: enough for a few lives to cross each other."""
HISTORY_MAX = 40
ROUNDS_MAX = 5000
"""By then everything is quiet: the longest pause is a day, and nothing takes more than weeks."""

USUAL = (
    AttemptInDoubt, IdempotencyKeyReused, OutcomeUnknown, PaymentNotClosable, PaymentNotHeld, PaymentNotPayable,
    PaymentOrderExists, RefundExceedsPaid, RefundInsufficientBalance, RefundNotRefundable, WalletInsufficientFunds,
)  # fmt: skip
"""What a shop may be told. Everything else is a mistake of ours."""


@dataclass(slots=True)
class Intent:
    """What a shop wants, under one idempotency key; repeated until it is known what became of it, and after."""

    what: str
    call: Callable[[], Coroutine[Any, Any, Answer]]
    name: str | None = None
    """The public id that the first answer gave."""


class World:
    """Everything of one seed."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        self.random = Random(seed)
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.counts: Counter[str] = Counter()
        self.history: deque[str] = deque(maxlen=HISTORY_MAX)
        self.is_kind = False
        self.journal = MemoryJournal(TABLES, self.clock)
        self.fresh_id = seeded_ids(self.clock, self.random)
        self.shops = [self._shop(home) for home in (7, 8)]
        self.providers: dict[str, Provider] = {}
        self.checker = Checker(self.journal, self.providers, {shop.home: shop.overdraft for shop in self.shops})
        self.door = Door(self.journal, self.random, self._committed)
        self.line = Line(self.clock, self.random, self.checker, self.later)
        self.line.providers = self.providers
        self.checker.watch(self.line.on_the_way)
        for shop in self.shops:
            for channel in CHANNELS:
                self.line.connect(Provider(channel, shop.home, self))
        self.reads = MemoryPayments(self.journal)
        self.payments = self._process()
        self.intents: list[Intent] = []
        self.wallets: list[tuple[Merchant, Id]] = []
        self._serial = 0
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self._firing: set[tuple[Id, str, int]] = set()
        self._later: list[tuple[float, int]] = []
        self._events_seen = 0

    # What the provider and the line need

    def now(self) -> datetime:
        """What time it is."""
        return self.clock.now()

    def later(self, delay_s: float, act: Callable[[], None]) -> None:
        """Something happens after a while, whether or not our process lives then."""
        self._serial += 1
        heapq.heappush(self._later, (self.loop.time() + delay_s, self._serial))
        self.loop.call_later(delay_s, act)

    def notify(self, provider: Provider, said: Said, *, surely: bool) -> None:
        """The provider calls back, as well as the line lets it."""
        self.note(f"{provider.name} of {provider.home} says {said.kind} {said.number} {said.state}")
        if not self.is_kind and not surely and self.random.random() < 0.2:
            self.counts["callbacks_missing"] += 1
            return
        self._call_back(provider, said, 0, surely)

    def _call_back(self, provider: Provider, said: Said, tries: int, surely: bool) -> None:
        pause_s = CALLBACK_PAUSES_S[min(tries, len(CALLBACK_PAUSES_S) - 1)] * self.random.uniform(0.1, 2.0)
        body = msgspec.json.encode(said)

        def deliver() -> None:
            if not self.is_kind and self.random.random() < 0.2:
                again(False)
                return
            self.start(self._deliver(provider, said, body, again))

        def again(taken: bool) -> None:
            if taken and not self.is_kind and self.random.random() < 0.15:
                self.counts["callbacks_twice"] += 1
                self.later(
                    self.random.uniform(0, 4000), lambda: self.start(self._deliver(provider, said, body, _nothing))
                )
            if not taken and (surely or tries < len(CALLBACK_PAUSES_S)):
                self._call_back(provider, said, tries + 1, surely)

        self.later(pause_s, deliver)

    async def _deliver(self, provider: Provider, said: Said, body: bytes, then: Callable[[bool], None]) -> None:
        answered = False
        try:
            answer = await self.payments.handle_callback(provider.home, provider.name, {"signed": "yes"}, body)
            answered = answer.status == 200
            self.counts["callbacks"] += 1
            if answered:
                self._check_taken(said)
        except OutcomeUnknown:
            self.counts["callbacks_unanswered"] += 1
        finally:
            # Also when our process dies: the provider gets no answer, and sends it again.
            then(answered)

    def _check_taken(self, said: Said) -> None:
        """ "Taken" is said only after the commit. (A refund that is abnormal here is asked after first.)"""
        row = self.journal.rows.get((ATTEMPT if said.kind == "charge" else REFUND, Id(said.number)))
        state = row.state if isinstance(row, Attempt | Refund) else "missing"
        if said.state == "succeeded" and state not in PAID | {"reversed", "abnormal"}:
            self.checker.broken(7, f"the callback {said.kind} {said.number} succeeded was taken, but it is {state}")

    # Our process

    def _process(self) -> Payments:
        return Payments(
            self.door,
            self.reads,
            self.line,
            self.line,
            self.clock,
            "https://kassa.example",
            fresh_id=self.fresh_id,
            chance=self.random.random,
        )

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Something that our process does; it ends when the process dies."""
        self.loop.create_task(work)

    def own(self, loop: asyncio.AbstractEventLoop, work: Any, **how: Any) -> "asyncio.Task[Any]":
        """Makes every task of our process, so that a crash finds them all in the same order, and no error is lost."""
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **how)
        self._serial += 1
        number = self._serial
        self._tasks[number] = task

        def ended(task: "asyncio.Task[Any]") -> None:
            self._tasks.pop(number, None)
            if (
                not task.cancelled()
                and (error := task.exception()) is not None
                and not isinstance(error, OutcomeUnknown)
            ):
                self.checker.broken(6, f"unexpected {type(error).__name__}: {error}")

        task.add_done_callback(ended)
        return task

    async def crash(self) -> None:
        """Our process loses all that it has in memory, at whatever point it is, and is started again."""
        self.counts["crashes"] += 1
        self.note("our process dies")
        self.door.crash()
        await self.stop()
        self._firing.clear()
        self.payments = self._process()

    async def stop(self) -> None:
        """Everything that our process does ends where it is."""
        dying = list(self._tasks.values())
        for task in dying:
            task.cancel()
        if dying:
            await asyncio.wait(dying)

    def _committed(self) -> None:
        self.counts["commits"] += 1
        for event in self.journal.events[self._events_seen :]:
            self.counts[event.type] += 1
            self.note(f"{event.type} #{event.sequence} of {event.root}")
        self._events_seen = len(self.journal.events)
        self.checker.after_commit()

    def note(self, text: str) -> None:
        """Something happened."""
        self.history.append(f"{self.loop.time():12.3f} {text}")

    # Shops

    def _shop(self, home: int) -> Merchant:
        random = self.random
        shop = Merchant(
            home, Id(f"{home:032x}"), 0, 0, "active", self.clock.now(), "Shop",
            random.choice((0, 6000, 3800, 29_999, 333_333)),
            random.choice(("returned", "returned", "kept")),
            random.choice(("refund", "accept", "hold")),
            random.choice((0, 0, 500)),
        )  # fmt: skip
        account = AccountOpen(chart.payable(home, CURRENCY), Limit.DEBITS_WITHIN_CREDITS, shop.overdraft)
        self.journal.commit_now([Change(home=home, new=(shop,), opens=(account,))])
        return shop

    def _ask(self, what: str, call: Callable[[], Coroutine[Any, Any, Answer]]) -> Intent:
        intent = Intent(what, call)
        self.intents.append(intent)
        self.start(self._perform(intent))
        return intent

    async def _perform(self, intent: Intent) -> None:
        """The shop asks, and remembers the first answer: every later one must speak of the same thing."""
        self.counts[intent.what] += 1
        try:
            answer = await intent.call()
        except USUAL as error:
            self.counts["refused"] += 1
            if intent.name is not None and not isinstance(error, OutcomeUnknown):
                self.checker.broken(2, f"{intent.what}: first answered {intent.name}, then refused: {error}")
            return
        except KassaError as error:
            self.checker.broken(6, f"{intent.what} got an answer that it cannot get: {error}")
            return
        if intent.name is not None and intent.name != answer.name:
            self.checker.broken(2, f"{intent.what} has two effects under one key: {intent.name} and {answer.name}")
        intent.name = answer.name

    def _once(self, operation: str) -> tuple[OnceKey, str]:
        self._serial += 1
        key = f"k-{self._serial}"
        return OnceKey(operation, key, hashlib.sha256(key.encode()).digest()), f"o-{self._serial}"

    def _amount(self) -> int:
        return self.random.choice((1, 2, 3, 99, 100, 101, 1000, 9999, self.random.randint(1, 50_000)))

    def open_wallet(self) -> None:
        """A user gets a wallet."""
        shop = self.random.choice(self.shops)
        once, user = self._once("wallet")

        async def call() -> Answer:
            answer = await self.payments.create_wallet(shop, user, CURRENCY, once)
            wallet = Id(answer.name.removeprefix("wal_"))
            if (shop, wallet) not in self.wallets:
                self.wallets.append((shop, wallet))
            return answer

        self._ask("wallets", call)

    def pay_by_channel(self) -> None:
        """An order that is to be paid through a channel."""
        shop, wait_s = self.random.choice(self.shops), self._patience()
        once, name = self._once("payment")
        order = self._order(name)
        self._ask("payments", lambda: self.payments.create(shop, order, once, wait_s=wait_s))

    def top_up(self) -> None:
        """Money for a wallet."""
        if not self.wallets:
            self.open_wallet()
            return
        shop, wallet = self.random.choice(self.wallets)
        once, name = self._once("topup")
        order, wait_s = self._order(name, wallet), self._patience()
        self._ask("topups", lambda: self.payments.topup(shop, order, once, wait_s=wait_s))

    def _order(self, name: str, wallet: Id | None = None) -> Order:
        return Order(
            order_id=name,
            amount=self._amount(),
            currency=CURRENCY,
            channel=self.random.choice(CHANNELS),
            method="native",
            expires_in_s=self.random.choice((60, 120, 300, 900)),
            wallet=wallet,
        )

    def _patience(self) -> float:
        return self.random.choice((0.0, 0.5, 8.0))

    def pay_from_wallet(self) -> None:
        """A payment that is final at once; sometimes for more than the wallet has."""
        if not self.wallets:
            return
        shop, wallet = self.random.choice(self.wallets)
        balance = self.journal.accounts[chart.wallet(shop.home, wallet, CURRENCY)].available
        for _ in range(self.random.choice((1, 1, 3))):
            amount = max(1, self.random.choice((balance, balance // 2, balance // 3, balance + 1)))
            self._pay_once_from(shop, wallet, amount)

    def _pay_once_from(self, shop: Merchant, wallet: Id, amount: int) -> None:
        once, name = self._once("payment")
        order = Order(
            order_id=name, amount=amount, currency=CURRENCY, channel="wallet", method="wallet", wallet=wallet
        )  # fmt: skip
        self._ask("wallet_payments", lambda: self.payments.create(shop, order, once))

    def same_order_again(self) -> None:
        """The same order under another key, and another order under the same key: both are refused."""
        payment = self._some_payment()
        if payment is None:
            return
        shop, (once, _) = self._shop_of(payment), self._once("payment")
        order = Order(
            order_id=payment.order_id, amount=self._amount(), currency=CURRENCY, channel="second", method="native",
            wallet=payment.wallet,
        )  # fmt: skip
        if payment.kind == "payment":
            self._ask("same_orders", lambda: self.payments.create(shop, order, once))

    def refund(self) -> None:
        """Money back, sometimes several times at once, sometimes too much."""
        payment = self._some_payment(("succeeded",)) or self._some_payment()
        if payment is None:
            return
        shop = self._shop_of(payment)
        amounts = [
            self.random.choice((None, payment.amount, payment.amount // 3, payment.amount // 2 + 1, 1))
            for _ in range(self.random.choice((1, 1, 2, 4)))
        ]
        for amount in amounts:
            once, name = self._once("refund")
            request = Ask(
                id=self.fresh_id(), refund_id=name, amount=None if amount is None else max(1, amount), kind=payment.kind
            )
            wait_s = self._patience()
            self._ask("refunds", _refund_call(self, shop, payment.id, request, once, wait_s))

    def cancel_refund(self) -> None:
        """A refund is taken back, if it is not too late."""
        row = self._some_row(REFUND, ("reserved", "sending", "unknown"))
        if isinstance(row, Refund):
            self.start(self._cancel(row))

    async def _cancel(self, refund: Refund) -> None:
        self.counts["cancels"] += 1
        try:
            await self.payments.cancel_refund(refund.home, refund.root, refund.id)
        except (RefundNotRefundable, OutcomeUnknown):
            self.counts["refused"] += 1

    def close(self) -> None:
        """The shop wants no money any more."""
        payment = self._some_payment(("processing", "closing")) or self._some_payment()
        if payment is None:
            return
        shop, (once, _), wait_s = self._shop_of(payment), self._once("close"), self._patience()
        self._ask(
            "closes", lambda: self.payments.close(shop, payment.id, once, kind=payment.kind, wait_s=wait_s)
        )  # fmt: skip

    def add_attempt(self) -> None:
        """The payer wants to pay another way."""
        payment = self._some_payment(("processing",))
        if payment is None:
            return
        shop, (once, _), wait_s = self._shop_of(payment), self._once("attempt"), self._patience()
        way = Way(channel=self.random.choice(CHANNELS), method="native")
        self.checker.attempts_asked[payment.id] += 1
        self._ask(
            "attempts",
            lambda: self.payments.add_attempt(shop, payment.id, way, once, kind=payment.kind, wait_s=wait_s),
        )

    def resolve(self) -> None:
        """A person decides about held money."""
        payment = self._some_payment(("held",)) or self._some_held_duplicate()
        if payment is None:
            return
        shop, (once, _), decision = (
            self._shop_of(payment),
            self._once("resolve"),
            self.random.choice(("accept", "refund")),
        )
        self._ask(
            "resolves", lambda: self.payments.resolve(shop, payment.id, decision, "asked", once, kind=payment.kind)
        )  # fmt: skip

    def repeat(self) -> None:
        """A shop has lost an answer, or is not sure, and asks again under the same key."""
        if self.intents:
            intent = self.intents[-1 - min(int(self.random.expovariate(0.2)), len(self.intents) - 1)]
            self.counts["repeats"] += 1
            self.start(self._perform(intent))

    def forge(self) -> None:
        """Somebody sends us what is not true."""
        provider = self.random.choice(list(self.providers.values()))
        numbers = [*provider.orders, *provider.returns]
        if not numbers:
            return
        number = self.random.choice(numbers)
        order = provider.orders.get(number)
        body = order.body if order is not None else provider.returns[number].body
        said = Said(
            "succeeded", number, "lie", body.amount, body.currency, attach=order.body.attach if order else None,
            kind="charge" if order else "refund",
        )  # fmt: skip
        self.start(self._lie(provider, said))

    async def _lie(self, provider: Provider, said: Said) -> None:
        what, headers, body = lies(self.random, said)
        self.counts["lies"] += 1
        self.note(f"somebody lies about {said.kind} {said.number}: {what}")
        try:
            answer = await self.payments.handle_callback(provider.home, provider.name, headers, body)
        except OutcomeUnknown:
            return
        if answer.status == 200:
            self.checker.broken(8, f"a lie about {said.kind} {said.number} was taken: {what}")

    def _some_held_duplicate(self) -> Payment | None:
        """A payment whose second money cannot be given back."""
        for refund in self.journal.all_of(REFUND):
            if isinstance(refund, Refund) and refund.state in ("failed", "reversed") and refund.doubt_since is not None:
                payment = self.journal.rows[PAYMENT, refund.root]
                return payment if isinstance(payment, Payment) else None
        return None

    def _some_payment(self, states: tuple[str, ...] = ()) -> Payment | None:
        row = self._some_row(PAYMENT, states)
        return row if isinstance(row, Payment) else None

    def _some_row(self, table: Any, states: tuple[str, ...] = ()) -> Any:
        rows = [row for row in self.journal.all_of(table) if not states or getattr(row, "state", "") in states]
        return self.random.choice(rows[-8:]) if rows else None

    def _shop_of(self, payment: Payment) -> Merchant:
        return next(shop for shop in self.shops if shop.home == payment.home)

    # Workers

    def fire_due(self, *, late: float) -> None:
        """Acts on what is due; some of it not yet, some of it twice, as workers without a common clock do."""
        now = self.clock.now()
        for timer in list(self.journal.timers.values()):
            name = (timer.entity, timer.kind, timer.generation)
            if timer.due > now or self.random.random() < late:
                continue
            if name in self._firing and self.random.random() > 0.1:
                continue
            self._firing.add(name)
            self.start(self._fire(timer, name))

    async def _fire(self, timer: StoredTimer, name: tuple[Id, str, int]) -> None:
        self.counts["timers"] += 1
        try:
            await self.payments.fire(timer.kind, timer.home, timer.root, timer.entity)
        except OutcomeUnknown:
            self.counts["timers_unanswered"] += 1
        finally:
            self._firing.discard(name)

    # The course of things

    async def live(self, steps: int) -> None:
        """So many things happen."""
        for _ in range(3):
            self.open_wallet()
        for _ in range(steps):
            (act,) = self.random.choices(_ACTS, _WEIGHTS)
            if act is World.crash:
                await self.crash()
            else:
                act(self)
            await asyncio.sleep(self.random.choice((0.0, 0.0, 0.01, 0.5, 5.0, 30.0, 120.0, 120.0, 600.0)))
            self.fire_due(late=0.2)
            if self.checker.found:
                return

    async def get_quiet(self) -> None:
        """Nothing goes wrong any more, and nobody asks for anything; what was begun comes to its end."""
        self.is_kind = self.door.is_kind = self.line.is_kind = True
        for provider in self.providers.values():
            provider.is_kind = True
        for _ in range(ROUNDS_MAX):
            if self.checker.found:
                return
            now = self.loop.time()
            while self._later and self._later[0][0] < now:
                heapq.heappop(self._later)
            waiting = [timer.due for timer in self.journal.timers.values() if not self._is_stuck(timer)]
            if not waiting and not self._later and not self._tasks_running():
                return
            pauses = [1.0] if self._tasks_running() else []
            pauses += [max((min(waiting) - self.clock.now()).total_seconds(), 0.01)] if waiting else []
            pauses += [self._later[0][0] - now + 0.01] if self._later else []
            await asyncio.sleep(min(pauses))
            self.fire_due(late=0.0)
        self.checker.broken(12, "it does not get quiet")

    def _tasks_running(self) -> bool:
        return bool(self._tasks)

    def _is_stuck(self, timer: StoredTimer) -> bool:
        """A refund that the provider cannot credit is asked after for ever; a person must act."""
        row = self.journal.rows.get((REFUND, timer.entity))
        if not isinstance(row, Refund) or row.state != "abnormal":
            return False
        return any(
            back.state == "abnormal"
            for provider in self.providers.values()
            if (back := provider.returns.get(row.id)) is not None
        )


def _refund_call(
    world: World, shop: Merchant, payment: Id, request: Ask, once: OnceKey, wait_s: float
) -> Callable[[], Coroutine[Any, Any, Answer]]:
    return lambda: world.payments.refund(shop, payment, request, once, wait_s=wait_s)


def _nothing(taken: bool) -> None:
    """The second delivery of what was taken is not repeated."""


_CHOICES: dict[Any, int] = {
    World.pay_by_channel: 24, World.top_up: 10, World.pay_from_wallet: 10, World.refund: 18, World.cancel_refund: 3,
    World.close: 6, World.add_attempt: 8, World.repeat: 12, World.same_order_again: 2, World.resolve: 5,
    World.forge: 6, World.crash: 6,
}  # fmt: skip
_ACTS, _WEIGHTS = list(_CHOICES), list(_CHOICES.values())


def simulate(seed: int, steps: int = STEPS) -> Report:
    """One world from its seed: lives `steps` things, gets quiet, is reckoned up. Depends on nothing else."""
    loop = VirtualLoop()
    with _no_logs():
        try:
            world = loop.run_until_complete(_run(seed, steps, loop))
        finally:
            loop.close()
    return world


async def _run(seed: int, steps: int, loop: VirtualLoop) -> Report:
    world = World(seed, loop)
    loop.set_task_factory(world.own)
    await world.live(steps)
    await world.get_quiet()
    shown = [] if world.checker.found else world.checker.at_the_end()
    history = tuple(world.history) if world.checker.found else ()
    await world.stop()
    counts = {**world.counts, **{f"line_{name}": number for name, number in world.line.faults.items()}}
    counts["door_doubts"] = world.door.doubts
    counts["virtual_hours"] = int(loop.time() / 3600)
    digest = world.journal.chain[-1][6].hex() if world.journal.chain else ""
    return Report(
        seed, steps, tuple(str(violation) for violation in world.checker.found), counts, tuple(shown), history, digest
    )


@contextmanager
def _no_logs() -> Iterator[None]:
    """What the service would tell an operator is not told here: the report is what counts."""
    before = structlog.get_config()
    structlog.configure(processors=[_drop])
    try:
        yield
    finally:
        structlog.configure(**before)


def _drop(logger: Any, method: str, event: Any) -> Any:
    raise structlog.DropEvent
