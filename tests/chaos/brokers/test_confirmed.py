"""kill -9 of the relay when a broker has confirmed what it sent, and before that is noted: it is sent again, and has one effect."""

import asyncio
from collections import Counter

import asyncpg
import pytest

import tally
from chaos.brokers.chain import Chain, judge_chain, under_load
from chaos.house import until

pytestmark = pytest.mark.long

DEATHS = 3
MORE = 25
"""Effects between two deaths."""
LAPSE = "UPDATE message_lease SET leased_until = now() WHERE topic LIKE 'replies:%'"
"""Time passes for answers: a dead relay keeps those that it had in its hands for a minute."""


async def test_what_was_confirmed_when_the_relay_died_is_sent_again_and_has_its_effect_once(chain: Chain) -> None:
    """Its cursor stands before the events; the answers are in their queue."""
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        async with under_load(chain, client, wallet):
            for kind in ("event", "message") * DEATHS:
                await chain.progress(MORE)
                await send_again(chain, await die_with(chain, kind))
            await chain.progress(MORE)
        await judge_chain(chain, client)


async def die_with(chain: Chain, kind: str) -> list[str]:
    """What the broker had just confirmed, by name."""
    relay = chain.parts["relay"]
    relay.crash_at(f"{kind}.confirmed")

    async def is_dead() -> bool:
        return not relay.is_alive

    await until(is_dead, f"the relay to die with a confirmed {kind}\n{chain.log()}")
    tally.count(f"kills of the relay with something confirmed beside {chain.post.scheme}")
    return relay.confirmed()[-1]


async def send_again(chain: Chain, had: list[str]) -> None:
    """The relay is started, until the broker has confirmed all of it once more."""
    relay = chain.parts["relay"]
    connection = await asyncpg.connect(chain.told["database"])
    try:
        await connection.execute(LAPSE)
    finally:
        await connection.close()
    await asyncio.to_thread(relay.start)

    async def is_repeated() -> bool:
        times = Counter(name for names in relay.confirmed() for name in names)
        return all(times[name] > 1 for name in had)

    await until(is_repeated, f"{had} to be sent again\n{chain.log()}")
