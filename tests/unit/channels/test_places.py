"""One merchant's conversations leave room for others."""

import asyncio

import pytest

from kassa.channels.places import Crowded, Places


async def hold(places: Places, name: str, until: asyncio.Event) -> None:
    async with places.at(name):
        await until.wait()


async def test_an_account_waits_for_its_own_places_and_for_nobody_elses() -> None:
    places, over = Places(per_account=2, wait_s=60), asyncio.Event()
    holders = [asyncio.create_task(hold(places, "slow", over)) for _ in range(5)]
    await asyncio.sleep(0)

    async with places.at("quick"):
        waiting = sum(not task.done() for task in holders)
    over.set()
    await asyncio.gather(*holders)

    assert waiting == 5
    assert not places._accounts


async def test_who_gets_no_place_in_time_is_told_so() -> None:
    places, over = Places(per_account=1, wait_s=0.01), asyncio.Event()
    holder = asyncio.create_task(hold(places, "slow", over))
    await asyncio.sleep(0)

    with pytest.raises(Crowded):
        async with places.at("slow"):
            pass
    over.set()
    await holder

    async with places.at("slow"):
        assert len(places._accounts) == 1
    assert not places._accounts


async def test_a_place_is_given_back_when_the_conversation_fails() -> None:
    places = Places(per_account=1, wait_s=0.01)

    with pytest.raises(ZeroDivisionError):
        async with places.at("a"):
            raise ZeroDivisionError

    async with places.at("a"):
        assert True
