"""kill -9 of an API alone and of a worker alone, at named points of the path, under load; the other ones go on."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import tally
from chaos.house import Client, judge, under_load, until
from chaos.parts import Part, Parts
from chaos.test_kill_points import PLANS, slow_down

pytestmark = pytest.mark.long
"""Four processes per row, killed one after the other."""

OF_WORKERS = ("query.", "webhook.")
"""What a worker comes by; everything else an API comes by, and both come by the channel."""


@pytest.fixture
def parts(tmp_path: Path, database_url: str) -> Iterator[Parts]:
    """Two APIs and two workers on a database of their own."""
    parts = Parts(tmp_path / "kassa", database_url)
    try:
        parts.start()
        yield parts
    finally:
        parts.stop()


async def crash(client: Client, wallet: str, part: Part, plan: str) -> None:
    """Under load that goes to both APIs, the part dies there, and is started again by hand."""
    await slow_down(client, plan)
    async with under_load(client, wallet):
        part.crash_at(plan)

        async def is_dead() -> bool:
            return not part.is_alive

        await until(is_dead, f"{part.name} to die at {plan}")
        tally.count("kills")
        await asyncio.to_thread(part.start)
        await client.door("/faults", method="DELETE")


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if not plan.startswith(OF_WORKERS)])
async def test_an_api_dies_and_the_others_go_on(parts: Parts, name: str) -> None:
    """The API that the provider calls: its callbacks wait, or the workers ask."""
    async with parts.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        await crash(client, wallet, parts.apis[0], PLANS[name])
        await judge(client)


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan.startswith(OF_WORKERS)])
async def test_a_worker_dies_and_the_others_go_on(parts: Parts, name: str) -> None:
    async with parts.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        for worker in parts.workers:
            await crash(client, wallet, worker, PLANS[name])
        await judge(client)


async def test_all_parts_are_stopped_and_replaced_one_after_the_other_under_load(parts: Parts) -> None:
    """As in an update: SIGTERM, exit code 0, the new one starts, and the shop notices nothing that a repeat does not mend."""
    async with parts.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        async with under_load(client, wallet):
            for part in parts.parts:
                assert await asyncio.to_thread(part.stop) == 0, part.log()[-3000:]
                await asyncio.to_thread(part.start)
        await judge(client)
