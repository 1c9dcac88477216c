"""The whole chain of real processes: an API, workers, a broker, and somebody's bookkeeping at the other end.

Payments come over the API and over the queue; each event of them has an effect in the books. Any part may be killed; in the end
acknowledged payments, events and effects must be the same, one by one, and each root's effects in its events' order.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg

import tally
from chaos.brokers.posts import Database, Post
from chaos.house import PATIENCE_S, Client, House, hurried, judge, until
from chaos.parts import Part
from kassa.db.away import AWAY
from kassa.db.pool import connect, open_pool
from kassa.errors import KassaError
from kassa.ids import event_name, new_id
from kassa.messaging.binder import Resources
from kassa.messaging.model import Ack, Confirmed, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import EVENTS, PAYMENT_ORDERS, Topic
from kassa.messaging.wake import Wakeups
from servers.server import free_ports

OTHERS = ("payments", "sweeper", "dispatcher", "webhooks", "holds", "retention", "orders")
"""All workers but the relay."""
DRAIN_S = 240.0
"""The longest that effects may stand still before the chain counts as stuck."""
ANSWER_S = 5.0
"""A program that got no answer for so long asks again."""
SEND_S = 2.0
ALL_EVENTS = "SELECT writer, seq, ord, root, sequence, type FROM event ORDER BY writer, seq, ord"
EFFECTS = "SELECT event, root, sequence, type FROM effect ORDER BY place"


class Supervised(Part):
    """One that is started again and again, as systemd does, until it works: it may need what is away just now."""

    def start(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                super().start()
            except AssertionError:
                if self.is_alive or time.monotonic() > deadline:
                    raise
            else:
                return


class Books(Supervised):
    """The bookkeeping at the other end."""

    def __init__(self, house: House, broker: str, database_url: str, group: str) -> None:
        super().__init__(house, "books", environment={})
        self._command = [sys.executable, "-m", "chaos.brokers.books", broker, database_url, group]


class Chain(House):
    """A Kassa of real processes, its broker, and the books. Use it as `with running(…)`."""

    def __init__(self, directory: Path, database_url: str, post: Post, books_url: str) -> None:
        """books_url: the database of the books."""
        super().__init__(directory, database_url)
        self.post = post
        self.books_url = books_url
        self.group = f"books-{new_id()[-12:]}"
        (port,) = free_ports(1)
        self._api = f"http://127.0.0.1:{port}"
        environment = {
            "KASSA_DATABASE_URL": database_url,
            "KASSA_PUBLIC_URL": self._api,
            "KASSA_WEBHOOK_ALLOW_PRIVATE": "true",
            "KASSA_BROKERS": post.url,
            "KASSA_ORDER_QUEUE": "durable",
        }
        self.parts = {
            "api": Supervised(self, "api", "serve", "--port", str(port), environment=environment),
            "relay": Supervised(self, "relay", "worker", "relay", environment=environment),
            "orders": Supervised(self, "orders", "worker", *OTHERS, environment=environment),
            "books": Books(self, post.url, books_url, self.group),
        }
        self.before: set[str] = set()
        """Events of the time before there was a broker."""

    def start(self) -> None:
        """What belongs to it is set up by `kassa up`; then each part is a process of its own."""
        super().start()
        self._end()
        self.before = set(asyncio.run(_events(self.told["database"])))
        with ThreadPoolExecutor() as threads:
            list(threads.map(Part.start, self.parts.values()))
        time.sleep(self.post.settles_s)

    def stop(self) -> None:
        for part in self.parts.values():
            part.end()
        super().stop()

    @property
    def api(self) -> str:
        return self._api

    @property
    def victims(self) -> tuple[str, ...]:
        return ("broker", *self.parts)

    def strike(self, victim: str) -> None:
        """kill -9."""
        if victim == "broker":
            self.post.kill()
        else:
            self.parts[victim].end()
            tally.count(f"kills beside {self.post.scheme}")

    def shut(self) -> None:
        """The broker is away; PostgreSQL cannot be without Kassa, so there nobody takes anything to it or from it."""
        if isinstance(self.post, Database):
            self.parts["relay"].end()
            self.parts["books"].end()
        else:
            self.post.stop()

    def open(self) -> None:
        """It is back."""
        if isinstance(self.post, Database):
            self.parts["relay"].start()
            self.parts["books"].start()
        else:
            self.post.start()

    def revive(self, victim: str) -> None:
        """As an operator's supervisor would."""
        if victim == "broker":
            self.post.start()
        else:
            self.parts[victim].start()

    def log(self) -> str:
        return super().log() + "".join(f"\n--- {name}\n{part.log()[-3000:]}" for name, part in self.parts.items())

    def command(self, *arguments: str) -> str:
        """What the program `kassa` says on this installation."""
        done = subprocess.run(
            [sys.executable, "-m", "kassa.cli.main", *arguments, "--database-url", self.told["database"]],
            capture_output=True, text=True, check=False, cwd=self.directory,
            env=os.environ | {"KASSA_BROKERS": self.post.url, "KASSA_DIR": str(self.directory)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    # The books

    async def effects(self) -> list[Any]:
        """Rows of the books, in the order in which they were written."""
        connection = await asyncpg.connect(self.books_url, timeout=5)
        try:
            return list(await connection.fetch(EFFECTS))
        finally:
            connection.terminate()

    async def count_effects(self) -> int:
        """0 while the database is away."""
        try:
            connection = await asyncpg.connect(self.books_url, timeout=5)
        except AWAY:
            return 0
        try:
            found: int = await connection.fetchval("SELECT count(*) FROM effect")
            return found
        except AWAY:
            return 0
        finally:
            connection.terminate()

    async def progress(self, more: int) -> None:
        """Until so many more effects are there."""
        wanted = await self.count_effects() + more

        async def is_there() -> bool:
            return await self.count_effects() >= wanted

        await until(is_there, f"{more} more effects\n{self.log()}", DRAIN_S)


async def _events(database_url: str) -> dict[str, tuple[str, int, str]]:
    """Root, sequence and type of each event, by name."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch(ALL_EVENTS)
    finally:
        connection.terminate()
    return {event_name(row[0], row[1], row[2]): (row["root"].hex, row["sequence"], row["type"]) for row in rows}


# Payments


class Asker:
    """A program that pays over the queue, and asks again when it hears nothing. Use it as `async with`."""

    def __init__(self, chain: Chain, client: Client) -> None:
        self._chain = chain
        self._client = client
        self.database_url: str = chain.told["database"]
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> "Asker":
        url = self.database_url
        topic = PAYMENT_ORDERS._replace(declaration="durable")
        name = f"answers-{new_id()[-12:]}"
        self.address = Topic(name, ("client",), "Answers.", lanes=1, keyed=False, declaration="durable")
        self.pool = await open_pool(url, application="asker")
        wakeups = Wakeups(lambda: connect(url, application="asker wake"))
        self.binder = make_binder(self._chain.post.url, Resources(self.pool, wakeups, (topic, self.address, EVENTS)))
        await self.binder.open()
        await self.binder.provision([self.address])
        self._subscription = await self.binder.subscribe(name, "client")
        self._hearing = asyncio.create_task(self._hear())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)
        await self.binder.close()
        self.pool.terminate()

    async def pay(self, wallet: str, amount: int = 3) -> dict[str, Any]:
        """One payment, asked for until there is an answer."""
        order = {"order_id": new_id(), "amount": amount, "channel": "wallet", "payer": {"wallet": wallet}}
        payment = await self.ask(order)
        assert (payment["object"], payment["order_id"]) == ("payment", order["order_id"]), payment
        self._client.acknowledged.append(payment)
        tally.count(f"payments over the queue of {self._chain.post.scheme}")
        return payment

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, which is sent again every few seconds."""
        correlation_id = new_id()
        future = self._answers[correlation_id] = asyncio.get_running_loop().create_future()
        deadline = time.monotonic() + 2 * PATIENCE_S
        try:
            while time.monotonic() < deadline:
                await self._send(body, correlation_id)
                with suppress(TimeoutError):
                    async with asyncio.timeout(ANSWER_S):
                        return await asyncio.shield(future)
                tally.count(f"requests that were asked again on {self._chain.post.scheme}")
            raise AssertionError(f"{body} was never answered\n{self._chain.log()}")
        finally:
            del self._answers[correlation_id]

    async def _send(self, body: dict[str, Any], correlation_id: str) -> None:
        """Until the broker has it."""
        headers = {"correlation-id": correlation_id, "reply-to": self.address.name}
        record = Record(new_id(), "", json.dumps(body).encode(), headers)
        while True:
            with suppress(KassaError, *AWAY):
                (receipt,) = await self.binder.send(PAYMENT_ORDERS.name, [record], deadline_s=SEND_S)
                if receipt == Confirmed():
                    return
            await asyncio.sleep(0.2)

    async def _hear(self) -> None:
        """One subscription for as long as it lives: it comes back by itself."""
        while True:
            try:
                deliveries = await self._subscription.receive(100, 1.0)
                for delivery in deliveries:
                    waiting = self._answers.get(delivery.record.headers.get("correlation-id", ""))
                    if waiting is not None and not waiting.done():
                        waiting.set_result(json.loads(delivery.record.body))
                await self._subscription.settle([(delivery, Ack()) for delivery in deliveries])
            except (KassaError, *AWAY):
                await asyncio.sleep(0.2)


@asynccontextmanager
async def under_load(chain: Chain, client: Client, wallet: str) -> AsyncIterator[Asker]:
    """Three shops and two programs pay as long as the block, and end their last payments after it."""
    is_over = asyncio.Event()

    async def shop() -> None:
        while not is_over.is_set():
            payment = await client.pay_from(wallet, random.randint(2, 9))
            tally.count(f"payments over the API beside {chain.post.scheme}")
            if random.random() < 0.3:
                await client.refund(payment, 1)

    async def program(asker: Asker) -> None:
        while not is_over.is_set():
            await asker.pay(wallet)

    async with Asker(chain, client) as asker, hurried(chain):
        load = [asyncio.create_task(shop()) for _ in range(3)]
        load += [asyncio.create_task(program(asker)) for _ in range(2)]
        try:
            yield asker
            is_over.set()
            await asyncio.gather(*load)
        finally:
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)


# The verdict


async def drained(chain: Chain) -> None:
    """Until there are as many effects as events; fails when nothing has come for long."""
    connection = await asyncpg.connect(chain.told["database"])
    try:
        wanted = await connection.fetchval("SELECT count(*) FROM event") - len(chain.before)
    finally:
        connection.terminate()
    last, since = -1, time.monotonic()
    while (found := await chain.count_effects()) < wanted:
        if found != last:
            last, since = found, time.monotonic()
        assert time.monotonic() - since < DRAIN_S, f"{found} of {wanted} effects\n{chain.log()}"
        await asyncio.sleep(0.1)


async def judge_chain(chain: Chain, client: Client, *, unnamed: int = 0) -> None:
    """Money is right; payments that were acknowledged, events and effects are the same, each once, each root's in order.

    unnamed: payments that were acknowledged to somebody who did not note their ids.
    """
    await judge(client)
    async with hurried(chain):
        await drained(chain)
    events = await _events(chain.told["database"])
    effects = await chain.effects()
    names = Counter(row["event"] for row in effects)
    assert not [name for name, times in names.items() if times > 1], "an effect happened twice"
    ours = events.keys() - chain.before
    missing, foreign = ours - names.keys(), names.keys() - ours
    assert not missing, (
        f"{len(missing)} of {len(ours)} are missing, {len(foreign)} are not ours: {sorted(missing)[:3]} …"
    )
    assert not foreign, f"{len(foreign)} are not ours: {sorted(foreign)[:3]} …"
    for row in effects:
        root, sequence, type_ = events[row["event"]]
        assert (row["root"].rpartition("_")[2], row["sequence"], row["type"]) == (root, sequence, type_)
    _judge_order(effects)
    acknowledged = {made["id"] for made in client.acknowledged if made["object"] == "payment"}
    paid = [row["root"] for row in effects if row["type"] == "payment.succeeded"]
    assert len(paid) == len(set(paid)) == len(acknowledged) + unnamed and set(paid) >= acknowledged
    await asyncio.to_thread(chain.command, "ledger", "verify")
    tally.count(f"effects behind {chain.post.scheme}", len(effects))


def _judge_order(effects: list[Any]) -> None:
    by_root: dict[str, list[int]] = {}
    for row in effects:
        by_root.setdefault(row["root"], []).append(row["sequence"])
    wrong = {root: found for root, found in by_root.items() if found != sorted(found)}
    assert not wrong, wrong


@asynccontextmanager
async def running(directory: Path, database_url: str, post: Post, books_url: str) -> AsyncIterator[Chain]:
    """A chain that works, and of which nothing is left afterwards."""
    chain = Chain(directory, database_url, post, database_url if isinstance(post, Database) else books_url)
    try:
        await asyncio.to_thread(chain.start)
        yield chain
    finally:
        await asyncio.to_thread(chain.stop)
