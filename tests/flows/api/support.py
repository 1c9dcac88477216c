"""An API of its own on a database of its own, and merchants that use it over HTTP."""

import base64
import itertools
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from kassa.api.server import Api
from kassa.app import App
from kassa.ids import Id, new_id
from kassa.journal.change import Change, Committed
from kassa.ledger import chart
from kassa.ledger.chart import Posting
from kassa.ledger.model import single
from kassa.merchants.records import Merchant
from kassa.settings import Settings
from kassa.workers.loops import idle_workers, prepare_brokers, supervisor

_numbers = itertools.count(1)


def settings_for(database_url: str, **given: Any) -> Settings:
    """Settings of a test: any port, a key that is known, webhooks to this machine allowed."""
    key = base64.b64encode(b"k" * 32).decode()
    defaults: dict[str, Any] = {
        "database_url": database_url,
        "port": _free_port(),
        "secrets_key": key,
        "webhook_allow_private": True,
        "idempotency_wait_s": 0.3,
        # A channel that is slow on a busy machine is waited for as long as can be.
        "channel_wait_s": 30.0,
        "stop_grace_s": 2.0,
        "pool_min": 1,
    }
    return Settings(**(defaults | given))


def _free_port() -> int:
    """A port that is free now: the callbacks' address must be known before the server listens.

    Below those that the system gives to connections, so that none of these takes it meanwhile.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports are taken")


class Shop:
    """A merchant with a key, and a client that has it."""

    def __init__(self, app: App, merchant: Merchant, key: str, http: httpx.AsyncClient) -> None:
        self.app = app
        self.merchant = merchant
        self.key = key
        self.http = http

    async def post(self, path: str, body: Any = None, *, key: str | None = None, **headers: str) -> httpx.Response:
        """A POST with an Idempotency-Key of its own unless one is given."""
        sent = {"Idempotency-Key": key or f"key-{next(_numbers)}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, json=body, headers=sent)

    async def get(self, path: str, **query: Any) -> httpx.Response:
        """A GET."""
        return await self.http.get(path, params=query)

    async def wallet(self, amount: int = 0, currency: str = "CNY") -> str:
        """A wallet with money in it, as a top-up would have brought it."""
        made = await self.post("/v1/wallets", {"user": f"u-{next(_numbers)}", "currency": currency})
        assert made.status_code == 201, made.text
        name: str = made.json()["id"]
        if amount:
            await self.fund(name, amount, currency)
        return name

    async def fund(self, wallet: str, amount: int, currency: str = "CNY") -> None:
        """Money from a channel into a wallet."""
        home = self.merchant.home
        source = chart.receivable(home, currency)
        target = chart.wallet(home, Id(wallet[4:]), currency)
        change = Change(home=home, transfers=(single(Posting.TOPUP, source, target, amount),), root=new_id())
        assert isinstance(await self.app.journal.commit(change), Committed)

    async def pay(self, wallet: str, amount: int = 100, *, key: str | None = None, **fields: Any) -> httpx.Response:
        """A payment from a wallet."""
        order = {"order_id": f"o-{next(_numbers)}", "amount": amount, "currency": "CNY", "channel": "wallet"}
        return await self.post("/v1/payments", order | {"payer": {"wallet": wallet}} | fields, key=key)


class House:
    """A running API."""

    def __init__(self, app: App, api: Api, http: httpx.AsyncClient) -> None:
        self.app = app
        self.api = api
        self.http = http
        self._clients: list[httpx.AsyncClient] = []

    async def shop(self, name: str = "Shop", *, scopes: str = "all", **policies: Any) -> Shop:
        """A merchant with an API key."""
        merchant = await self.app.merchants.create(name, **policies)
        return await self.shop_of(merchant, scopes=scopes)

    async def shop_of(self, merchant: Merchant, *, scopes: str = "all") -> Shop:
        """One more key of a merchant."""
        made = await self.app.merchants.create_key(merchant.id, scopes=scopes)
        client = httpx.AsyncClient(base_url=self.api.url, headers={"Authorization": f"Bearer {made.key}"}, timeout=60.0)
        self._clients.append(client)
        return Shop(self.app, merchant, made.key, client)

    async def close(self) -> None:
        """Ends the clients."""
        for client in self._clients:
            await client.aclose()


@asynccontextmanager
async def running(database_url: str, **given: Any) -> AsyncIterator[House]:
    """An API that runs as long as the block."""
    app = App(settings_for(database_url, **given))
    await app.start()
    workers = supervisor(app)
    await prepare_brokers(app)
    api = Api(app, idle_workers=lambda: idle_workers(workers))
    workers.start()
    await api.start()
    async with httpx.AsyncClient(base_url=api.url, timeout=60.0) as http:
        house = House(app, api, http)
        try:
            yield house
        finally:
            await house.close()
            await api.stop()
            await workers.stop()
            await app.stop()
