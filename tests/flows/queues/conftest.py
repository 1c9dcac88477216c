"""A shop behind each broker of the registry, on its real server."""

from collections.abc import AsyncIterator, Iterator

import pytest

from brokers.rabbit_house import at_once
from flows.api.support import House, running
from flows.queues.house import SERVERS, Till, client_of
from flows.wechat_sandbox import SandboxProcess
from kassa.messaging.registry import REGISTRY


def schemes() -> list[object]:
    """One parameter per broker; it needs its server."""
    kinds = {module: scheme for scheme, module in sorted(REGISTRY.items(), reverse=True)}
    return [
        pytest.param(scheme, marks=pytest.mark.needs(SERVERS[scheme]) if scheme in SERVERS else ())
        for scheme in sorted(kinds.values())
    ]


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    """A WeChat Pay of our own, shared by the tests."""
    process = SandboxProcess(tmp_path_factory.mktemp("wechat"))
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(params=schemes())
def broker_url(request: pytest.FixtureRequest) -> str:
    """Where the broker is."""
    server = SERVERS.get(request.param)
    url: str = request.param if server is None else request.getfixturevalue(server).url
    return at_once(url) if request.param == "amqp" else url


@pytest.fixture
async def till(database_url: str, broker_url: str, sandbox: SandboxProcess) -> AsyncIterator[Till]:
    """A running shop whose only merchant is the queue's."""
    async with running(database_url, brokers=(broker_url,), order_queue="plain") as house:
        yield await till_of(house, sandbox)
    sandbox.door("DELETE", "/faults")


async def till_of(house: House, sandbox: SandboxProcess) -> Till:
    """The house's shop, with its channel and a client."""
    shop = await house.shop(fee_ppm=6000)
    await house.app.merchants.set_channel(shop.merchant.id, "wechat", sandbox.credentials)
    (broker,) = house.app.brokers
    return Till(house, shop, broker, await client_of(broker))
