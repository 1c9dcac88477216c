"""Where nobody but Kassa can make what travels over a broker."""

import pytest

from flows.api.support import running


@pytest.mark.parametrize("broker", ["postgres", "zeromq://127.0.0.1:0"])
async def test_verify_asks_nobody_for_what_is_in_our_own_tables(database_url: str, broker: str) -> None:
    async with running(database_url, brokers=(broker,), broker_topology="verify") as house:
        (opened,) = house.app.brokers
        await opened.binder()

        assert opened.away_since is None
        assert await opened.subscribed("payment_order")
