"""Each fault of the provider on each operation: payment and refund end as the provider's books say."""

import asyncio

import pytest

from chaos.house import Client, House, hurried, judge, until
from kassa.channels.sandbox.faults import Fault

OPERATIONS = ("create", "query", "close", "refund", "refund_query", "callback")
DELAY_MS = 300
TIMES = 2
OUR_LIMIT_MS = 8000
"""What a request to the provider may take at most."""


async def bought(client: Client) -> None:
    """A payment that is paid and partly given back, whatever the provider does meanwhile."""
    payment = await client.order(500)
    await client.pay(payment)
    await client.until(f"/v1/payments/{payment['id']}", "succeeded")
    refund = await client.refund(payment, 200)
    await client.until(f"/v1/refunds/{refund['id']}", "succeeded")


async def closed(client: Client) -> None:
    """A payment that nobody paid and that the merchant closes."""
    payment = await client.order(300)
    answer = await client.once("POST", f"/v1/payments/{payment['id']}/close")
    assert answer.status_code in (200, 202), answer.text
    await client.until(f"/v1/payments/{payment['id']}", "closed")


async def wronged(client: Client) -> None:
    """The provider took down an order of another amount. It is never booked, and never forgotten: nobody pays it here."""
    payment = await client.order(500)
    answer = await client.once("POST", f"/v1/payments/{payment['id']}/close")
    assert answer.status_code in (200, 202), answer.text
    await client.until(f"/v1/payments/{payment['id']}", "closed")


async def live(client: Client, on: str, fault: Fault, delay_ms: int = DELAY_MS) -> None:
    """One payment's life with the fault in its way."""
    await client.door("/faults", {"on": on, "fault": fault.value, "times": TIMES, "delay_ms": delay_ms})
    if (on, fault) == ("create", Fault.WRONG_AMOUNT):
        await wronged(client)
    elif on == "close":
        await closed(client)
    else:
        await bought(client)
    await client.door("/faults", method="DELETE")


@pytest.mark.parametrize("on", OPERATIONS)
async def test_every_fault_ends_as_the_books_say(house: House, on: str) -> None:
    async with house.shop() as client:
        await client.listen()
        await client.door("/settings", {"refund_delay_ms": 50, "callback_speed": 20, "signtest_every": 0})
        async with hurried(house):
            for fault in Fault:
                try:
                    await live(client, on, fault)
                except AssertionError as failure:
                    raise AssertionError(f"{fault.value} on {on}: {failure}") from failure
        await judge(client)


@pytest.mark.long
@pytest.mark.parametrize("fault", [Fault.DELAY, Fault.LATE, Fault.MISSING], ids=lambda fault: fault.value)
@pytest.mark.parametrize("on", OPERATIONS)
async def test_a_provider_that_is_slower_than_we_wait(house: House, on: str, fault: Fault) -> None:
    """The answer comes after our own time limit, or never."""
    async with house.shop() as client:
        await client.listen()
        await client.door("/settings", {"refund_delay_ms": 50, "callback_speed": 20, "signtest_every": 0})
        async with hurried(house):
            await live(client, on, fault, OUR_LIMIT_MS + 1000)
        await judge(client)
        print(f"{fault.value} on {on}, {TIMES} times {OUR_LIMIT_MS + 1000} ms: as the books say")


async def test_a_provider_that_dies_is_started_again_and_nothing_is_in_doubt(house: House) -> None:
    """kill -9 of the sandbox while it has orders, payers and refunds."""
    async with house.shop() as client:
        await client.listen()
        async with hurried(house):
            load = asyncio.gather(*(bought(client) for _ in range(6)))
            await until(lambda: _some_acknowledged(client, 3), "some orders")
            house.kill_sandbox()
            await until(lambda: _some_acknowledged(client, 8), "some refunds")
            house.kill_sandbox()
            await load
        await judge(client)


async def _some_acknowledged(client: Client, count: int) -> bool:
    return len(client.acknowledged) >= count
