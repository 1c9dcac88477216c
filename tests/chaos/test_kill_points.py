"""kill -9 of API and workers at named points of the path, under load; then the same command again, and nothing is lost."""

import asyncio

import pytest

import tally
from chaos.house import Client, House, judge, under_load, until
from kassa.cli.sandboxes import is_alive

pytestmark = pytest.mark.long
"""Processes die here at chosen moments, for minutes in all; `make test` has the same promises in miniature in
flows/cli and conformance/journal."""

PLANS = {
    "before a wallet payment is stored": "wallet.intended",
    "in a wallet payment's commit": "wallet.intended>commit.before",
    "after a wallet payment's commit": "wallet.intended>commit.after",
    "before the intent is stored": "charge.intended",
    "in the intent's commit": "charge.intended>commit.before",
    "when the intent is stored and nobody knows": "charge.intended>commit.after",
    "before anything is sent": "charge.request",
    "while the provider has it": "charge.sent",
    "when the provider has answered": "charge.answered",
    "in the outcome's commit": "charge.answered>commit.before",
    "after the outcome's commit": "charge.answered>commit.after",
    "before the provider is asked": "query.request",
    "while the provider is asked": "query.sent",
    "when the provider has said what it knows": "query.answered",
    "in that knowledge's commit": "query.answered>commit.before",
    "before a close is sent": "close.request",
    "while the provider closes": "close.sent",
    "when the provider has closed": "close.answered",
    "in the close's commit": "close.answered>commit.before",
    "when a callback arrives": "callback.received",
    "in a callback's commit": "callback.received>commit.before",
    "after a callback's commit": "callback.received>commit.after",
    "before a refund is stored": "refund.intended",
    "after a refund's intent": "refund.intended>commit.after",
    "before a refund is sent": "refund.request",
    "while the provider has a refund": "refund.sent",
    "when a refund is answered": "refund.answered",
    "in a refund's commit": "refund.answered>commit.before",
    "after a refund's commit": "refund.answered>commit.after",
    "before a webhook is sent": "webhook.request",
    "when a webhook is sent": "webhook.sent",
    "in a webhook's commit": "webhook.sent>commit.before",
    "after a webhook's commit": "webhook.sent>commit.after",
}
"""What happens, and the points that are reached on the way there."""

QUICK = (
    ("before the intent is stored", "when the intent is stored and nobody knows", "while the provider has it"),
    ("in the outcome's commit", "when a refund is answered", "when a webhook is sent"),
)
"""Those of which each covers another gap between two commits; one house for three, killed three times."""


SLOW = {"charge.sent": "create", "refund.sent": "refund", "close.sent": "close", "query.sent": "query"}
"""Where the provider is told to take its time, so that it surely has the request in its hands."""


async def crash(client: Client, wallet: str, plan: str) -> None:
    """Under load, the process dies there, and is started again by hand."""
    house = client.house
    await slow_down(client, plan)
    async with under_load(client, wallet):
        house.crash_at(plan)

        async def is_dead() -> bool:
            return not house.is_alive

        await until(is_dead, f"to die at {plan}")
        house.kill()
        await asyncio.to_thread(house.start)
        await client.door("/faults", method="DELETE")


async def slow_down(client: Client, plan: str) -> None:
    """Where somebody is to die while the provider has the request, the provider takes its time."""
    if plan in SLOW:
        await client.door("/faults", {"on": SLOW[plan], "fault": "delay", "times": 20, "delay_ms": 400})


OTHERS = (
    "in the intent's commit",
    "when the intent is stored and nobody knows",
    "while the provider has it",
    "in the outcome's commit",
    "after a callback's commit",
    "when a webhook is sent",
)
"""Where somebody else dies: the database in the middle of a commit, the provider with a request in its hands."""


async def bereave(client: Client, wallet: str, plan: str, victim: str) -> None:
    """Under load, PostgreSQL with all its processes or the provider dies there; `kassa up` starts it again by itself."""
    house = client.house
    pid = house.server_pid if victim == "postgres" else house.sandbox_pid
    assert pid is not None
    async with under_load(client, wallet):
        house.crash_at(f"{pid}@{plan}")

        async def is_another() -> bool:
            return not is_alive(pid)

        await until(is_another, f"{victim} to die at {plan}")
        tally.count("kills")
    assert house.is_alive


@pytest.mark.parametrize("victim", ["postgres", "sandbox"])
async def test_nothing_is_lost_when_another_is_killed(whole_house: House, victim: str) -> None:
    async with whole_house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        for name in OTHERS[:3] if victim == "postgres" else OTHERS[2:4]:
            await bereave(client, wallet, PLANS[name], victim)
        await judge(client)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["postgres", "sandbox"])
@pytest.mark.parametrize("name", PLANS)
async def test_nothing_is_lost_when_another_is_killed_at_any_point(whole_house: House, name: str, victim: str) -> None:
    async with whole_house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        await bereave(client, wallet, PLANS[name], victim)
        await judge(client)
        print(f"{victim} killed {name}: {len(client.acknowledged)} acknowledged, all there")


@pytest.mark.parametrize("names", QUICK, ids=lambda names: names[0])
async def test_nothing_is_lost_when_it_is_killed(house: House, names: tuple[str, ...]) -> None:
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        for name in names:
            await crash(client, wallet, PLANS[name])
        await judge(client)


@pytest.mark.long
@pytest.mark.parametrize("name", PLANS)
async def test_nothing_is_lost_at_any_point(house: House, name: str) -> None:
    """Each point three times, judged each time."""
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        for _ in range(3):
            await crash(client, wallet, PLANS[name])
            await judge(client)
        print(f"{name}: 3 kills, {len(client.acknowledged)} acknowledged, all there")
