"""A house per test, with two shops in it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from flows.api.support import House, Shop, running
from flows.wechat_sandbox import SandboxProcess


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    """A WeChat Pay of our own. The tests share it, and leave no fault behind."""
    process = SandboxProcess(tmp_path_factory.mktemp("wechat"))
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[House]:
    """An API on a database of its own."""
    async with running(database_url) as running_house:
        yield running_house


@pytest.fixture
async def wechat_shop(house: House, sandbox: SandboxProcess) -> AsyncIterator[Shop]:
    """A merchant with an account at the sandbox."""
    shop = await house.shop(fee_ppm=6000)
    await house.app.merchants.set_channel(shop.merchant.id, "wechat", sandbox.credentials)
    yield shop
    sandbox.door("DELETE", "/faults")


@pytest.fixture
async def shop(house: House) -> Shop:
    """A merchant that takes a fee of 0.6 %."""
    return await house.shop(fee_ppm=6000)
