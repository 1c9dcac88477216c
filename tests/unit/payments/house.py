"""A small world for rules about payments: the memory journal, a stopped clock, and a merchant. After every step it checks
what must always hold: the books balance, no bound is broken, and whatever is not final has a timer."""

from datetime import datetime, timedelta
from typing import Any, cast

import msgspec

from kassa.channels.model import (
    Abnormal,
    ActionType,
    Closed,
    Evidence,
    Failed,
    NextAction,
    NotFound,
    NotSent,
    Outcome,
    Pending,
    Succeeded,
    Unknown,
)
from kassa.clock import FrozenClock
from kassa.errors import KassaError
from kassa.ids import Id, new_id
from kassa.journal.change import Aggregate, Change, Claim, Committed, Money, Refused, Rule, Verdict
from kassa.journal.memory import MemoryJournal
from kassa.journal.table import Table, Tables
from kassa.ledger import chart
from kassa.ledger.chart import Code
from kassa.ledger.model import AccountKey
from kassa.merchants.records import API_KEY, CHANNEL_ACCOUNT, MERCHANT, Merchant
from kassa.payments import model, refunds
from kassa.payments.draft import Decided, News, Operation
from kassa.payments.fees import fee_of
from kassa.payments.memory import MemoryPayments
from kassa.payments.model import Order, Way
from kassa.payments.records import ATTEMPT, EXCHANGE, PAYMENT, REFUND, WALLET, Attempt, Exchange, Payment, Refund

TABLES = Tables((MERCHANT, API_KEY, CHANNEL_ACCOUNT, PAYMENT, ATTEMPT, REFUND, WALLET, EXCHANGE))
HOME = 7
NOTIFY_URL = "https://shop.example/v1/callbacks/wechat/mch_1"

SIGNED = Evidence("query", authentic=True, status=200)
LOST = Unknown(Evidence("transport", authentic=False), "no answer in time")
NOT_SENT = NotSent(Evidence("transport", authentic=False), "connection refused")
NOT_FOUND = NotFound(SIGNED)
CLOSED = Closed(SIGNED)
NOT_PAID = Pending(SIGNED)
QR = Pending(SIGNED, NextAction(ActionType.QR_CODE, {"code_url": "weixin://pay"}))
REFUSED = Failed(SIGNED, "PARAM_ERROR", "no")
ABNORMAL = Abnormal(SIGNED, "refund-1")


def paid(amount: int = 100, currency: str = "CNY", channel_id: str = "t-1") -> Succeeded:
    """The channel says: paid."""
    return Succeeded(SIGNED, channel_id, amount, currency)


def merchant(**policies: Any) -> Merchant:
    """A merchant with these policies."""
    return Merchant(
        **{
            "home": HOME, "id": Id("a" * 32), "version": 0, "sequence": 0, "state": "active", "name": "Shop",
            "created_at": FrozenClock().now(), "fee_ppm": 6000, **policies,
        }
    )  # fmt: skip


class World:
    """What a test does to payments, and what it sees."""

    def __init__(self, **policies: Any) -> None:
        self.clock = FrozenClock()
        self.journal = MemoryJournal(TABLES, self.clock)
        self.merchant = merchant(**policies)
        self.reads = MemoryPayments(self.journal)

    @property
    def now(self) -> datetime:
        return self.clock.now()

    # What is done

    def commit(self, change: Change) -> Verdict:
        """One change; then everything that must always hold is checked."""
        (verdict,) = self.journal.commit_now([change])
        self.check()
        return verdict

    def order(self, **fields: Any) -> Order:
        """An order of 100 fen by QR code."""
        return Order(
            **{
                "order_id": new_id(), "amount": 100, "currency": "CNY", "channel": "wechat", "method": "native", **fields
            }
        )  # fmt: skip

    def create(self, kind: str = "payment", **fields: Any) -> tuple[Id, Id]:
        """A payment through a channel, its attempt `sending`: (payment, attempt)."""
        payment_id, attempt_id = new_id(), new_id()
        change = model.channel_payment(
            self.order(**fields), self.merchant, payment_id, attempt_id, self.now, kind=kind, notify_url=NOTIFY_URL,
            once=None,
        )  # fmt: skip
        assert isinstance(self.commit(change), Committed)
        return payment_id, attempt_id

    def decide(
        self,
        payment_id: Id,
        decide: Any,
        children: tuple[Table, ...] = (ATTEMPT, REFUND),
        claims: tuple[Claim, ...] = (),
    ) -> Decided | KassaError:
        """A decision under the payment's lock: what it hands back, or the refusal."""

        def safely(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            try:
                return cast(Change | KassaError, decide(aggregate, now))
            except KassaError as error:
                return error

        verdict = self.commit(Change(home=HOME, claims=claims, rule=Rule(PAYMENT, payment_id, safely, children)))
        if isinstance(verdict, Refused):
            return verdict.error
        if isinstance(verdict, Money):
            return KassaError(str(verdict.refusal))
        assert isinstance(verdict, Committed), verdict
        return cast(Decided, verdict.result)

    def done(self, decided: Decided | KassaError) -> Decided:
        """What was decided, when it must not be refused."""
        assert isinstance(decided, Decided), decided
        return decided

    def says(self, payment_id: Id, attempt_id: Id, operation: Operation, outcome: Outcome) -> Decided:
        """The channel says something about an attempt."""
        news = News(operation, outcome, (self.exchange(payment_id, attempt_id, operation, outcome),))
        spare = new_id()
        return self.done(
            self.decide(
                payment_id,
                lambda aggregate, now: model.record_attempt(
                    aggregate, now, attempt_id=attempt_id, news=news, spare=spare, jitter=0.5
                ),
            )
        )

    def says_of_refund(self, payment_id: Id, refund_id: Id, operation: Operation, outcome: Outcome) -> Decided:
        """The channel says something about a refund."""
        seen = None if operation is Operation.CALLBACK else self.refund_row(refund_id).version
        news = News(operation, outcome, (self.exchange(payment_id, refund_id, operation, outcome),), seen)
        return self.done(
            self.decide(
                payment_id,
                lambda aggregate, now: refunds.record_refund(
                    aggregate, now, refund_id=refund_id, news=news, jitter=0.5
                ),
            )
        )

    def exchange(self, payment_id: Id, subject: Id, operation: Operation, outcome: Outcome) -> Exchange:
        """A row about a conversation."""
        return Exchange(
            HOME, new_id(), 0, payment_id, "sent", subject, operation.value, "POST", "/", 200, type(outcome).__name__,
            None, None, self.now, 1,
        )  # fmt: skip

    def look(self, payment_id: Id, attempt_id: Id) -> Decided:
        """The attempt's timer fires."""
        return self.done(
            self.decide(
                payment_id,
                lambda aggregate, now: model.look_at_attempt(aggregate, now, attempt_id=attempt_id, jitter=0.5),
            )
        )

    def look_at_refund(self, payment_id: Id, refund_id: Id) -> Decided:
        """The refund's timer fires."""
        return self.done(
            self.decide(payment_id, lambda aggregate, now: refunds.look_at_refund(aggregate, now, refund_id=refund_id))
        )

    def close(self, payment_id: Id) -> Decided | KassaError:
        return self.decide(payment_id, lambda aggregate, now: model.close(aggregate, now, kind="payment"))

    def expire(self, payment_id: Id) -> Decided:
        return self.done(self.decide(payment_id, model.expire))

    def apply_late_policy(self, payment_id: Id) -> Decided:
        spare = new_id()
        return self.done(
            self.decide(payment_id, lambda aggregate, now: model.apply_late_policy(aggregate, now, spare=spare))
        )

    def resolve(self, payment_id: Id, decision: str) -> Decided | KassaError:
        spare, exchange_id = new_id(), new_id()
        return self.decide(
            payment_id,
            lambda aggregate, now: model.resolve(
                aggregate, now, kind="payment", decision=decision, reason="asked by phone", spare=spare,
                exchange_id=exchange_id,
            ),
        )  # fmt: skip

    def add_attempt(self, payment_id: Id) -> Decided | KassaError:
        attempt_id = new_id()
        return self.decide(
            payment_id,
            lambda aggregate, now: model.add_attempt(
                aggregate, now, attempt_id=attempt_id, way=Way(channel="wechat", method="native"), kind="payment",
                notify_url=NOTIFY_URL,
            ),
        )  # fmt: skip

    def ask_refund(self, payment_id: Id, amount: int | None, kind: str = "payment") -> Decided | KassaError:
        refund_id = new_id()
        request = refunds.Ask(id=refund_id, refund_id=f"r-{refund_id}", amount=amount, kind=kind)
        return self.decide(payment_id, lambda aggregate, now: refunds.ask(aggregate, now, request))

    def refund(self, payment_id: Id, amount: int | None, kind: str = "payment") -> Id:
        """A refund that must be taken: its id."""
        refund = self.done(self.ask_refund(payment_id, amount, kind)).refund
        assert refund is not None
        return refund.id

    # Shorter ways to a state

    def waiting(self, **fields: Any) -> tuple[Id, Id]:
        """A payment whose QR code is shown."""
        payment_id, attempt_id = self.create(**fields)
        self.says(payment_id, attempt_id, Operation.CREATE, QR)
        return payment_id, attempt_id

    def succeeded(self, amount: int = 100, **fields: Any) -> Id:
        """A payment that is paid through a channel."""
        payment_id, attempt_id = self.waiting(amount=amount, **fields)
        self.says(payment_id, attempt_id, Operation.CALLBACK, paid(amount))
        return payment_id

    def closed(self) -> tuple[Id, Id]:
        """A payment that was closed at its channel."""
        payment_id, attempt_id = self.waiting()
        self.close(payment_id)
        self.says(payment_id, attempt_id, Operation.CLOSE, CLOSED)
        return payment_id, attempt_id

    def wallet(self, balance: int = 0) -> Id:
        """A wallet with this much in it, topped up through a channel."""
        wallet_id = new_id()
        change = model.new_wallet(self.merchant, wallet_id, f"u-{wallet_id}", "CNY", self.now, once=None)
        assert isinstance(self.commit(change), Committed)
        if balance:
            topup_id, attempt_id = self.create("topup", amount=balance, wallet=wallet_id)
            self.says(topup_id, attempt_id, Operation.CREATE, QR)
            self.says(topup_id, attempt_id, Operation.CALLBACK, paid(balance))
        return wallet_id

    def pay_from_wallet(self, wallet_id: Id, amount: int, **fields: Any) -> tuple[Id, Verdict]:
        """A payment from a wallet: its id and the verdict."""
        payment_id = new_id()
        order = self.order(channel="wallet", method="wallet", wallet=wallet_id, amount=amount, **fields)
        return payment_id, self.commit(model.wallet_payment(order, self.merchant, payment_id, self.now, None))

    # What is seen

    def payment(self, payment_id: Id) -> Payment:
        return cast(Payment, self.journal.rows[PAYMENT, payment_id])

    def attempt(self, attempt_id: Id) -> Attempt:
        return cast(Attempt, self.journal.rows[ATTEMPT, attempt_id])

    def refund_row(self, refund_id: Id) -> Refund:
        return cast(Refund, self.journal.rows[REFUND, refund_id])

    def refunds_of(self, payment_id: Id) -> list[Refund]:
        return [cast(Refund, row) for row in self.journal.children(REFUND, payment_id)]

    def exchanges_of(self, payment_id: Id) -> list[Exchange]:
        return [cast(Exchange, row) for row in self.journal.children(EXCHANGE, payment_id)]

    def events(self, root: Id) -> list[str]:
        return [event.type for event in self.journal.events if event.root == root]

    def event_data(self, root: Id, type_: str) -> dict[str, Any]:
        (event,) = [event for event in self.journal.events if event.root == root and event.type == type_]
        return cast(dict[str, Any], msgspec.json.decode(event.data))

    def timer(self, entity: Id, kind: str) -> timedelta | None:
        """How long until it is due; None: it is not set."""
        timer = self.journal.timers.get((entity, kind))
        return None if timer is None else timer.due - self.now

    def balance(self, key: AccountKey) -> int:
        account = self.journal.accounts.get(key)
        return 0 if account is None else account.balance

    @property
    def books(self) -> dict[str, int]:
        """The merchant's own accounts that are not zero: credits less debits, in CNY."""
        keys = {
            "payable": chart.payable(HOME, "CNY"),
            "fee": chart.fee_income(HOME, "CNY"),
            "receivable": chart.receivable(HOME, "CNY"),
            "suspense": chart.suspense(HOME, "CNY"),
        }
        return {name: self.balance(key) for name, key in keys.items() if self.balance(key)}

    @property
    def held(self) -> int:
        """What is reserved."""
        return sum(account.debits_pending for account in self.journal.accounts.values())

    # What must always hold

    def check(self) -> None:
        accounts = self.journal.accounts.values()
        assert sum(account.debits_posted - account.credits_posted for account in accounts) == 0
        assert sum(account.debits_pending - account.credits_pending for account in accounts) == 0
        assert self.reads.unarmed() == []
        for row in self.journal.all_of(PAYMENT):
            _check_payment(cast(Payment, row), self.refunds_of(row.id))
        for key, account in self.journal.accounts.items():
            if key.code in (Code.WALLET, Code.SUSPENSE):
                assert account.available >= 0, key


def _check_payment(payment: Payment, of: list[Refund]) -> None:
    asked = [refund for refund in of if refund.cause == "asked"]
    done = [refund for refund in asked if refund.state == "succeeded"]
    on_the_way = [
        refund for refund in asked if refund.state in ("reserved", "sending", "processing", "unknown", "abnormal")
    ]
    assert payment.amount_refunded == sum(refund.amount for refund in done)
    assert payment.amount_refunding == sum(refund.amount for refund in on_the_way)
    assert payment.fee_refunded == sum(refund.fee_returned for refund in done)
    assert payment.fee_refunding == sum(refund.fee_returned for refund in on_the_way)
    assert 0 <= payment.amount_refunded + payment.amount_refunding <= payment.amount
    assert 0 <= payment.fee_refunded + payment.fee_refunding <= fee_of(payment.amount, payment.fee_ppm)
