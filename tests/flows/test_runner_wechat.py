"""The channel and the runner against the sandbox in its own process: every operation, its callbacks and its faults."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.wechat_sandbox import Received, SandboxProcess, Shop, new_number, wait_until
from kassa.channels.channel import FreshKeys
from kassa.channels.model import (
    Abnormal,
    Advice,
    Charge,
    Closed,
    Method,
    NotFound,
    NoticeKind,
    NotSent,
    Outcome,
    Pending,
    Refund,
    Steps,
    Succeeded,
    Unknown,
)
from kassa.channels.registry import open_channel
from kassa.channels.runner import Exchange, Runner, fresh_nonce
from kassa.channels.wechat import WeChatPay
from kassa.errors import ChannelMessageInvalid


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    process = SandboxProcess(Path(tmp_path_factory.mktemp("sandbox")))
    process.settings(refund_delay_ms=50)
    yield process
    process.stop()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    server = shop.serve()
    yield shop
    server.shutdown()
    server.server_close()


class Wire:
    """The channel with its runner, for one test."""

    def __init__(self, sandbox: SandboxProcess, runner: Runner) -> None:
        opened = open_channel("wechat", sandbox.credentials)
        assert isinstance(opened.channel, WeChatPay)
        self.channel, self.base_url, self.runner = opened.channel, opened.base_url, runner
        self.trace: list[Exchange] = []

    async def run(self, steps: Steps) -> Outcome:
        return await self.runner.run(steps, self.base_url, self.trace.append)

    async def charge(self, command: Charge) -> Outcome:
        return await self.run(self.channel.charge(command, fresh_nonce))

    async def query(self, number: str) -> Outcome:
        return await self.run(self.channel.query(number, fresh_nonce))

    async def close(self, number: str) -> Outcome:
        return await self.run(self.channel.close(number, fresh_nonce))

    async def refund(self, command: Refund) -> Outcome:
        return await self.run(self.channel.refund(command, fresh_nonce))

    async def query_refund(self, number: str) -> Outcome:
        return await self.run(self.channel.query_refund(number, fresh_nonce))


@pytest.fixture
async def wire(sandbox: SandboxProcess) -> AsyncIterator[Wire]:
    async with Runner() as runner:
        yield Wire(sandbox, runner)
    sandbox.door("DELETE", "/faults")


def order(method: Method = Method.NATIVE, notify_url: str = "http://127.0.0.1:9/callback") -> Charge:
    return Charge(
        number=new_number(),
        amount=100,
        currency="CNY",
        method=method,
        description="两杯咖啡",
        expires_at=datetime.now(UTC) + timedelta(minutes=15),
        notify_url=notify_url,
        openid="oUpF8uMuAJO_M2pxb1Q9zNjWeS6o",
        payer_ip="203.0.113.7",
        attach="pay_1",
    )


def refund_of(command: Charge, amount: int = 30) -> Refund:
    return Refund(new_number(), command.number, amount, command.amount, "CNY", command.notify_url, "cold coffee")


@pytest.mark.parametrize("method", Method)
async def test_an_order_of_each_kind_and_its_repeat(method: Method, wire: Wire) -> None:
    command = order(method)

    first, again = await wire.charge(command), await wire.charge(command)

    for outcome in (first, again):
        assert isinstance(outcome, Pending)
        assert outcome.next_action is not None
        assert outcome.evidence.authentic


async def test_a_life_from_order_to_refund(wire: Wire, sandbox: SandboxProcess, shop: Shop) -> None:
    command = order(notify_url=shop.url)
    await wire.charge(command)
    assert type(await wire.query(command.number)) is Pending

    sandbox.pay(command.number)
    paid = await wire.query(command.number)

    assert isinstance(paid, Succeeded)
    assert (paid.amount, paid.currency) == (100, "CNY")
    assert paid.channel_id is not None
    by_their_number = await wire.run(wire.channel.query_by_channel_id(paid.channel_id, fresh_nonce))
    assert by_their_number == paid

    refund = refund_of(command)
    assert type(await wire.refund(refund)) is Pending
    done = await _until_final(wire, refund.number)
    assert isinstance(done, Succeeded)
    assert (done.amount, done.currency) == (30, "CNY")

    wait_until(lambda: len(_genuine(shop)) >= 2)
    told = [wire.channel.read_callback(one.headers, one.body, now=datetime.now(UTC)) for one in _genuine(shop)]
    assert {(notice.kind, notice.number) for notice in told} == {
        (NoticeKind.CHARGE, command.number),
        (NoticeKind.REFUND, refund.number),
    }
    assert all(isinstance(notice.outcome, Succeeded) for notice in told)


def _genuine(shop: Shop) -> list[Received]:
    return [one for one in shop.received if not one.is_probe]


async def _until_final(wire: Wire, number: str) -> Outcome:
    for _ in range(1200):
        outcome = await wire.query_refund(number)
        if not isinstance(outcome, Pending):
            return outcome
        await asyncio.sleep(0.05)
    raise AssertionError("the refund stayed open")


async def test_a_close_and_what_comes_after_it(wire: Wire) -> None:
    command = order()
    await wire.charge(command)

    assert type(await wire.close(command.number)) is Closed
    assert type(await wire.close(command.number)) is Closed
    assert type(await wire.query(command.number)) is Closed
    assert type(await wire.charge(command)) is Closed


async def test_a_paid_order_is_neither_closed_nor_made_again(wire: Wire, sandbox: SandboxProcess) -> None:
    command = order()
    await wire.charge(command)
    sandbox.pay(command.number)

    for outcome in (await wire.close(command.number), await wire.charge(command)):
        assert isinstance(outcome, Unknown)
        assert outcome.advice is Advice.QUERY


async def test_what_is_not_there_is_said_under_signature(wire: Wire) -> None:
    number = new_number()

    for outcome in (await wire.query(number), await wire.close(number), await wire.query_refund(number)):
        assert isinstance(outcome, NotFound)
        assert outcome.evidence.authentic


async def test_a_refund_that_cannot_be_credited_is_told(wire: Wire, sandbox: SandboxProcess) -> None:
    command = order()
    await wire.charge(command)
    sandbox.pay(command.number)
    refund = refund_of(command)
    await wire.refund(refund)
    await _until_final(wire, refund.number)

    sandbox.door("POST", "/refunds", {"out_refund_no": refund.number, "state": "ABNORMAL"})

    assert type(await wire.query_refund(refund.number)) is Abnormal


FAULTS: list[tuple[str, type[Outcome]]] = [
    ("drop_before", Unknown),
    ("drop_after", Unknown),
    ("status_5xx", Unknown),
    ("status_429", NotSent),
    ("garbage", Unknown),
    ("bad_signature", Unknown),
]


@pytest.mark.parametrize("operation", ["create", "query", "close", "refund", "refund_query"])
@pytest.mark.parametrize(("fault", "kind"), FAULTS)
async def test_each_fault_on_each_operation(
    operation: str, fault: str, kind: type[Outcome], wire: Wire, sandbox: SandboxProcess
) -> None:
    command = order()
    refund = refund_of(command)
    if operation != "create":
        await wire.charge(command)
    if operation in ("refund", "refund_query"):
        sandbox.pay(command.number)
    if operation == "refund_query":
        await wire.refund(refund)

    async def act() -> Outcome:
        match operation:
            case "create":
                return await wire.charge(command)
            case "query":
                return await wire.query(command.number)
            case "close":
                return await wire.close(command.number)
            case "refund":
                return await wire.refund(refund)
        return await wire.query_refund(refund.number)

    sandbox.fault(operation, fault, times=1)
    spoilt, then = await act(), await act()

    assert type(spoilt) is kind
    assert not isinstance(then, Unknown | NotSent), "the same again finds out"


async def test_an_order_whose_answer_was_lost_comes_back_with_its_code(wire: Wire, sandbox: SandboxProcess) -> None:
    command = order()
    sandbox.fault("create", "drop_after", times=1)

    lost = await wire.charge(command)
    seen = await wire.query(command.number)
    again = await wire.charge(command)

    assert type(lost) is Unknown
    assert type(seen) is Pending
    assert isinstance(again, Pending)
    assert again.next_action is not None


async def test_a_wrong_amount_reaches_who_compares_it(wire: Wire, sandbox: SandboxProcess) -> None:
    command = order()
    await wire.charge(command)
    sandbox.pay(command.number)
    sandbox.fault("query", "wrong_amount", times=1)

    outcome = await wire.query(command.number)

    assert isinstance(outcome, Succeeded)
    assert outcome.amount != command.amount


async def test_a_callback_with_a_bad_signature_is_refused(wire: Wire, sandbox: SandboxProcess, shop: Shop) -> None:
    command = order(notify_url=shop.url)
    await wire.charge(command)
    sandbox.fault("callback", "bad_signature", times=1)
    sandbox.pay(command.number)

    [first, *_] = shop.wait_for(1)

    with pytest.raises(ChannelMessageInvalid):
        wire.channel.read_callback(first.headers, first.body, now=datetime.now(UTC))


async def test_certificates_are_fetched_after_the_provider_changed_them(tmp_path: Path) -> None:
    sandbox = SandboxProcess(tmp_path)
    try:
        async with Runner() as runner:
            wire = Wire(sandbox, runner)
            old = _certificate_mode(sandbox)
            command = order()
            await wire.charge(command)
            sandbox.door("POST", "/rotate_key")

            doubt = await wire.run(old.query(command.number, fresh_nonce))
            fresh = await runner.run(old.fetch_keys(fresh_nonce), wire.base_url, wire.trace.append)

            assert isinstance(doubt, Unknown)
            assert doubt.advice is Advice.REFRESH_KEYS
            assert isinstance(fresh, FreshKeys)
            assert type(await wire.run(fresh.channel.query(command.number, fresh_nonce))) is Pending
    finally:
        sandbox.stop()


def _certificate_mode(sandbox: SandboxProcess) -> WeChatPay:
    credentials = {name: value for name, value in sandbox.credentials.items() if "public_key" not in name}
    channel = open_channel("wechat", credentials).channel
    assert isinstance(channel, WeChatPay)
    return channel
