"""What the service adds to the rules: repeats, refusals, and what a channel is told."""

from collections.abc import Callable, Generator
from typing import Any

import msgspec
import pytest

from kassa.channels.channel import Charges, Nonces
from kassa.channels.model import Charge, NotSent, Outcome, Request, Response, Steps, Unknown
from kassa.channels.runner import Exchange as Sent
from kassa.errors import (
    IdempotencyKeyReused,
    PaymentNotFound,
    PaymentOrderExists,
    RefundIdExists,
    RefundInsufficientBalance,
    WalletExists,
    WalletInsufficientFunds,
    WalletNotFound,
)
from kassa.ids import Id, new_id
from kassa.journal.change import OnceKey
from kassa.payments.draft import Operation
from kassa.payments.model import Order
from kassa.payments.refunds import Ask
from kassa.payments.service import Payments
from unit.payments.house import HOME, LOST, NOT_PAID, QR, World, paid


class Paper:
    """A channel whose answers are written down beforehand; it sends nothing."""

    def __init__(self, *answers: Outcome) -> None:
        self.answers = list(answers)
        self.said: list[tuple[str, object]] = []

    def charge(self, command: Charge, nonces: Nonces) -> Steps:
        return self._answer("create", command)

    def query(self, number: str, nonces: Nonces) -> Steps:
        return self._answer("query", number)

    def query_by_channel_id(self, channel_id: str, nonces: Nonces) -> Steps:
        return self._answer("query", channel_id)

    def close(self, number: str, nonces: Nonces) -> Steps:
        return self._answer("close", number)

    def _answer(self, operation: str, said: object) -> Steps:
        self.said.append((operation, said))
        return self.answers.pop(0)
        yield  # Makes this a conversation, of no requests.


class Desk:
    """Runs conversations that send nothing, and knows the one channel."""

    def __init__(self, paper: Paper) -> None:
        self.paper = paper

    async def run(
        self, steps: Generator[Request, Response, Any], base_url: str, trace: Callable[[Sent], None]
    ) -> Any | Unknown | NotSent:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        raise AssertionError("Paper sends nothing.")

    async def for_merchant(self, home: int, channel: str) -> tuple[Charges, str]:
        return self.paper, ""

    def learn(self, home: int, channel: str, fresh: Charges) -> None:
        raise AssertionError("Paper has no keys.")


def service(world: World, *answers: Outcome) -> tuple[Payments, Paper]:
    """Payments over a written channel."""
    paper = Paper(*answers)
    desk = Desk(paper)
    return Payments(world.journal, world.reads, desk, desk, world.clock, "https://kassa.example"), paper


def key(digest: bytes = b"1") -> OnceKey:
    return OnceKey("test", "k-1", digest)


def ask(refund_id: str, amount: int) -> Ask:
    return Ask(id=new_id(), refund_id=refund_id, amount=amount)


def wallet_order(world: World, wallet_id: Id, amount: int) -> Order:
    return world.order(channel="wallet", method="wallet", wallet=wallet_id, amount=amount)


async def test_a_lost_answer_is_asked_after_and_the_identical_command_is_sent_again() -> None:
    world = World()
    payments, paper = service(world, LOST, NOT_PAID, QR)
    shown = msgspec.json.decode((await payments.create(world.merchant, world.order(), None)).body)
    attempt_id, payment_id = Id(shown["attempts"][0]["number"]), Id(shown["id"][4:])
    assert shown["attempts"][0]["state"] == "unknown"

    await payments.drive_attempt(HOME, payment_id, attempt_id)

    assert [operation for operation, _ in paper.said] == ["create", "query", "create"]
    first, again = paper.said[0][1], paper.said[2][1]
    assert isinstance(first, Charge)
    assert isinstance(again, Charge)
    assert (first.repeat, again.repeat) == (False, True)
    assert world.attempt(attempt_id).state == "pending_payer"
    assert (first.number, first.expires_at, first.attach) == (again.number, again.expires_at, again.attach)
    assert [row.operation for row in world.exchanges_of(payment_id)] == ["create", "query", "create"]
    assert first.notify_url == f"https://kassa.example/v1/callbacks/wechat/mch_{world.merchant.id}"


async def test_a_repeat_gets_the_first_status_and_the_resource_as_it_stands() -> None:
    world = World()
    payments, paper = service(world, QR)
    order = world.order()
    first = await payments.create(world.merchant, order, key())
    payment_id = Id(msgspec.json.decode(first.body)["id"][4:])
    world.says(payment_id, Id(msgspec.json.decode(first.body)["attempts"][0]["number"]), Operation.CALLBACK, paid())

    again = await payments.create(world.merchant, order, key())

    assert (again.status, again.replayed, len(paper.said)) == (201, True, 1)
    assert msgspec.json.decode(again.body)["state"] == "succeeded"
    with pytest.raises(IdempotencyKeyReused):
        await payments.create(world.merchant, order, key(b"2"))


async def test_an_order_is_taken_once_whatever_the_key() -> None:
    world = World()
    payments, _ = service(world, QR)
    order = world.order(order_id="o-1")
    first = await payments.create(world.merchant, order, None)

    with pytest.raises(PaymentOrderExists) as refused:
        await payments.create(world.merchant, order, None)

    assert refused.value.facts["payment"] == first.name


async def test_wallets_are_refused_by_name() -> None:
    world = World()
    payments, _ = service(world)
    wallet_id = world.wallet(10)
    created = await payments.create_wallet(world.merchant, "u-1", "CNY", None)

    with pytest.raises(WalletInsufficientFunds) as short:
        await payments.create(world.merchant, wallet_order(world, wallet_id, 11), None)
    with pytest.raises(WalletNotFound):
        await payments.create(world.merchant, wallet_order(world, new_id(), 1), None)
    with pytest.raises(WalletExists) as exists:
        await payments.create_wallet(world.merchant, "u-1", "CNY", None)

    assert (short.value.facts["available"], short.value.facts["asked"]) == (10, 11)
    assert exists.value.facts["wallet"] == created.name


async def test_a_refund_that_the_merchant_cannot_cover_is_refused_and_its_number_stays_free() -> None:
    world = World(fee_on_refund="kept", fee_ppm=100_000)
    payments, _ = service(world)
    payment_id, _ = world.pay_from_wallet(world.wallet(100), 100)

    with pytest.raises(RefundInsufficientBalance):
        await payments.refund(world.merchant, payment_id, ask("r-1", 100), None)
    await payments.refund(world.merchant, payment_id, ask("r-1", 90), None)
    with pytest.raises(RefundIdExists):
        await payments.refund(world.merchant, payment_id, ask("r-1", 1), None)


async def test_another_merchant_sees_and_touches_nothing() -> None:
    world = World()
    payments, _ = service(world, QR)
    stranger = msgspec.structs.replace(world.merchant, home=HOME + 1)
    payment_id = Id(msgspec.json.decode((await payments.create(world.merchant, world.order(), None)).body)["id"][4:])

    with pytest.raises(PaymentNotFound):
        await payments.get_payment(stranger.home, payment_id)
    with pytest.raises(PaymentNotFound):
        await payments.close(stranger, payment_id, None)
    with pytest.raises(PaymentNotFound):
        await payments.refund(stranger, payment_id, ask("r-1", 1), None)
