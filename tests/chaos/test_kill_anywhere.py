"""kill -9 of whoever, whenever: moments and victims by chance, from a seed that is printed."""

import asyncio
import random

import pytest

from chaos.house import House, judge, under_load, until

pytestmark = pytest.mark.long
"""Half a minute of load with a death every second or so."""

KILLS = 12


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_whoever_dies_whenever(whole_house: House, seed: int) -> None:
    """API and workers, PostgreSQL and the provider die in any order, some while the last one is still coming back."""
    house, chance = whole_house, random.Random(seed)
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(100_000)
        async with under_load(client, wallet):
            for _ in range(KILLS):
                await _kill(house, chance)
                await asyncio.sleep(chance.uniform(0.0, 2.5))
        await judge(client)


async def _kill(house: House, chance: random.Random) -> None:
    match chance.choice(("kassa", "database", "sandbox")):
        case "kassa":
            house.kill()
            await asyncio.to_thread(house.start)
        case "database":

            async def is_there() -> bool:
                return house.server_pid is not None

            await until(is_there, "a PostgreSQL to kill")
            house.kill_database()
        case _:
            house.kill_sandbox()


async def test_nothing_is_lost_when_it_dies_while_it_starts(whole_house: House) -> None:
    """Killed in the middle of its own recovery, again and again, at later and later moments."""
    house = whole_house
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        async with under_load(client, wallet):
            await asyncio.sleep(0.5)
            house.kill_database()
            house.kill_sandbox()
            house.kill()
            for tenths in (1, 3, 5, 7, 9, 12, 15, 20):
                await asyncio.to_thread(house.start_and_kill, tenths / 10)
            await asyncio.to_thread(house.start)
        await judge(client)
