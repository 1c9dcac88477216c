"""`kassa up` as a real process with a real sandbox and a merchant's server, to be killed and judged afterwards."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx

import tally
from chaos.node import kill_family
from flows.wechat_sandbox import Shop as Receiver
from kassa.cli.sandboxes import is_alive
from kassa.ids import new_id
from kassa.journal.verify import verify
from kassa.tables import TABLES

PATIENCE_S = 240.0
"""Far more than anything takes: a machine with a tenfold load takes most of a minute to start a process."""
REQUEST_S = 60.0
"""A merchant whose request is not answered for so long sends it again."""
CALLBACK_SPEED = 100
"""The provider calls back again after a sixth of a second, not fifteen, and after a quarter of an hour, not a day."""
TESTS = Path(__file__).parent.parent

IN_DOUBT = """
SELECT 'attempt ' || state FROM attempt WHERE state IN ('new', 'sending', 'unknown')
UNION ALL SELECT 'payment ' || state FROM payment WHERE state IN ('closing', 'late_succeeded', 'late_refunding')
UNION ALL SELECT 'refund ' || state FROM refund WHERE state IN ('sending', 'processing', 'unknown')
UNION ALL SELECT 'delivery ' || state FROM webhook_delivery WHERE state NOT IN ('delivered', 'dropped')
UNION ALL SELECT 'dispatch' FROM event AS e WHERE NOT EXISTS
    (SELECT FROM webhook_delivery AS d WHERE d.home = e.home AND d.event_root = e.root AND d.event_sequence = e.sequence)
    AND e.type NOT LIKE 'webhook%' AND e.home IN (SELECT home FROM webhook_endpoint)
    AND e.at > (SELECT min(created_at) FROM webhook_endpoint)
"""
"""What would still change if one waited; refunds that wait for the provider's minute are not in doubt."""
HURRY = """
UPDATE timer SET due = now(), leased_until = NULL WHERE (entity, kind) IN
    (SELECT entity, kind FROM timer WHERE kind <> 'payment_expire'
     AND NOT (kind = 'refund' AND entity IN (SELECT id FROM refund WHERE state = 'reserved' AND tries = 0 AND cause = 'asked'))
     FOR UPDATE SKIP LOCKED)
"""
"""Time passes for timers: pauses grow to hours, and a dead process keeps its lease for a minute."""
LET_GO = "UPDATE log_group SET held_until = now() WHERE held_until > now()"
"""Time passes for readers of the log: a dead one holds its group for a quarter of a minute."""


class House:
    """`kassa up --dir DIR --database-url URL`, started and ended as often as a test likes."""

    def __init__(self, directory: Path, database_url: str | None, *options: str) -> None:
        """options: more of `kassa up`."""
        self.options = options
        self.directory = directory
        self.database_url = database_url
        self.told: dict[str, Any] = {}
        self.receiver = Receiver()
        self._server = self.receiver.serve()
        self._plan = directory / "crash-plan"
        self._process: subprocess.Popen[str] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Returns when it is ready to take a payment."""
        self._begin()
        self._end_of_start()

    def _begin(self) -> None:
        command = [sys.executable, "-m", "chaos.node", "up", "--dir", str(self.directory), "--port", "0", "--json"]
        if self.database_url is not None:
            command += ["--database-url", self.database_url]
        command += self.options
        environment = os.environ | {"PYTHONPATH": str(TESTS), "KASSA_CRASH_FILE": str(self._plan)}
        with (self.directory / "log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def _end_of_start(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log()[-3000:]
        self.told = json.loads(line)

    def start_and_kill(self, after_s: float) -> None:
        """kill -9 in the middle of a start."""
        self._begin()
        time.sleep(after_s)
        self.kill()

    @property
    def api(self) -> str:
        """Where the merchant sends the next request."""
        return str(self.told["api"])

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def crash_at(self, plan: str) -> None:
        """The process kills itself, or the `PID@` of the plan, when it has reached these points in this order."""
        fresh = self._plan.with_suffix(".new")
        fresh.write_text(plan)
        fresh.rename(self._plan)

    def signal(self, number: signal.Signals) -> None:
        """Sent to the process of API and workers."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of API and workers."""
        tally.count("kills")
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            assert self._process.stdout is not None
            self._process.stdout.close()

    @property
    def sandbox_pid(self) -> int:
        """The provider's process."""
        return int(json.loads((self.directory / "sandboxes" / "wechat.json").read_text())["pid"])

    @property
    def server_pid(self) -> int | None:
        """The process of its own PostgreSQL; None when there is none just now."""
        try:
            pid = int((self.directory / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
        except (FileNotFoundError, IndexError):
            return None
        return pid if is_alive(pid) else None

    def kill_sandbox(self) -> None:
        """kill -9 of the provider."""
        tally.count("kills")
        self._end_sandbox()

    def _end_sandbox(self) -> None:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self.sandbox_pid, signal.SIGKILL)

    def kill_database(self) -> None:
        """kill -9 of its own PostgreSQL, with all its processes."""
        pid = self.server_pid
        assert pid is not None
        tally.count("kills")
        kill_family(pid)

    def stop(self) -> None:
        """Nothing that was started is left."""
        if self.is_alive:
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                assert self._process is not None
                self._process.wait(15)
        self._end()
        self._end_sandbox()
        if self.database_url is None and (pid := self.server_pid) is not None:
            kill_family(pid)
        self._server.shutdown()
        self._server.server_close()

    def log(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def sandbox_url(self) -> str:
        return str(json.loads((self.directory / "sandboxes" / "wechat.json").read_text())["credentials"]["base_url"])

    def shop(self) -> "Client":
        """The merchant."""
        return Client(self)


class Client:
    """The merchant as a program: repeats under the same key until it has an answer. Use it as `async with`."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.acknowledged: list[dict[str, Any]] = []
        """What was answered with 201, whatever happened afterwards."""

    async def __aenter__(self) -> "Client":
        self.http = httpx.AsyncClient(timeout=REQUEST_S, trust_env=False)
        await self.door("/settings", {"callback_speed": CALLBACK_SPEED})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def once(self, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        """One request."""
        headers = {"Authorization": f"Bearer {self.house.told['api_key']}"}
        if method == "POST":
            headers["Idempotency-Key"] = key or new_id()
        return await self.http.request(method, self.house.api + path, json=body, headers=headers)

    async def post(self, path: str, body: Any, key: str | None = None, *, status: int = 201) -> dict[str, Any]:
        """Repeated until it is acknowledged with `status`. Fails on an answer that no repeat would change."""
        key = key or new_id()
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                answer = await self.once("POST", path, body, key)
                if answer.status_code == status:
                    made: dict[str, Any] = answer.json()
                    self.acknowledged.append(made)
                    tally.count("acknowledged requests")
                    return made
                assert answer.status_code in (408, 409, 503), answer.text
                assert answer.json()["retryable"], answer.text
            await asyncio.sleep(0.1)
        raise AssertionError(f"POST {path} was never acknowledged")

    async def get(self, path: str) -> dict[str, Any]:
        """Repeated until it is answered."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                answer = await self.once("GET", path)
                if answer.status_code == 200:
                    found: dict[str, Any] = answer.json()
                    return found
                assert answer.status_code == 503, answer.text
            await asyncio.sleep(0.1)
        raise AssertionError(f"GET {path} was never answered")

    async def door(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """The sandbox's control door, repeated while it is down."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            # KeyError: a sandbox that is only just starting has not said yet where it is.
            with suppress(httpx.TransportError, KeyError):
                answer = await self.http.request(method, f"{self.house.sandbox_url}/_sandbox{path}", json=body)
                assert answer.status_code < 500, answer.text
                return answer.json()
            await asyncio.sleep(0.1)
        raise AssertionError("the sandbox was never back")

    async def order(self, amount: int = 100, **more: Any) -> dict[str, Any]:
        """A payment by QR code."""
        order = {"order_id": new_id(), "amount": amount, "currency": "CNY", "channel": "wechat", "method": "native"}
        return await self.post("/v1/payments", order | more)

    async def wallet(self, amount: int) -> str:
        """A wallet with money in it that came through the channel."""
        wallet = await self.post("/v1/wallets", {"user": new_id(), "currency": "CNY"})
        order = {"order_id": new_id(), "wallet": wallet["id"], "amount": amount, "currency": "CNY"}
        topup = await self.post("/v1/topups", order | {"channel": "wechat", "method": "native"})
        await self.pay(topup)
        await self.until("/v1/topups/" + topup["id"], "succeeded")
        return str(wallet["id"])

    async def pay_from(self, wallet: str, amount: int = 100) -> dict[str, Any]:
        """A payment from a wallet."""
        order = {"order_id": new_id(), "amount": amount, "currency": "CNY", "channel": "wallet"}
        return await self.post("/v1/payments", order | {"payer": {"wallet": wallet}})

    async def pay(self, payment: dict[str, Any], **more: bool) -> None:
        """The payer pays, as soon as the provider has the order."""
        number = payment["attempts"][-1]["number"]

        async def is_paid() -> bool:
            return (await self.door("/pay", {"out_trade_no": number} | more)).get(
                "state"
            ) == "SUCCESS" or await self.is_paid(number)

        await until(is_paid, f"pay {number}")

    async def is_paid(self, number: str) -> bool:
        """Whether the provider's books have it as paid."""
        charges = (await self.door(f"/books?out_trade_no={number}", method="GET"))["charges"]
        return bool(charges) and charges[0]["state"] in ("SUCCESS", "REFUND")

    async def refund(self, payment: dict[str, Any], amount: int, refund_id: str | None = None) -> dict[str, Any]:
        """Money back."""
        body = {"amount": amount, "refund_id": refund_id or new_id()}
        return await self.post(f"/v1/payments/{payment['id']}/refunds", body)

    async def give_up(self, amount: int) -> None:
        """An order that the provider has and that nobody pays is closed, and paid all the same: the money goes back. (One
        that the provider may not have stays `closing` until its time and the time of grace are over: longer than a test.)
        """
        payment = await self.order(amount)
        path = f"/v1/payments/{payment['id']}"

        async def is_at_provider() -> bool:
            return bool((await self.get(path))["attempts"][-1]["state"] == "pending_payer")

        await until(is_at_provider, f"{path} at the provider")
        await self.post(f"{path}/close", None, status=200)
        await self.until(path, "closed")
        await self.pay(payment, after_close=True)

    async def until(self, path: str, state: str) -> dict[str, Any]:
        """What is there, once it is in that state."""
        found: dict[str, Any] = {}

        async def is_there() -> bool:
            found.update(await self.get(path))
            return bool(found["state"] == state)

        await until(is_there, f"{path} {state}")
        return found

    async def listen(self) -> None:
        """The merchant's server gets all events."""
        await self.post("/v1/webhook_endpoints", {"url": self.house.receiver.url, "events": ["*"]})


async def until(holds: Callable[[], Awaitable[bool]], what: str, patience_s: float = PATIENCE_S) -> None:
    """Fails with `what` when it does not come true in time."""
    deadline = time.monotonic() + patience_s
    while not await holds():
        assert time.monotonic() < deadline, f"it did not come true: {what}"
        await asyncio.sleep(0.1)


async def hurry(house: House) -> None:
    """Makes time pass for timers; a database that is away is asked later."""
    with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection = await asyncpg.connect(house.told["database"], timeout=5)
        try:
            await connection.execute(HURRY)
            await connection.execute(LET_GO)
        finally:
            connection.terminate()


async def shop_around(client: Client, wallet: str) -> None:
    """Orders, payers, refunds, closes and wallet payments, each repeated until it is acknowledged."""
    amount = random.randint(100, 999)
    payment = await client.order(amount)
    await client.pay(payment)
    bought = await client.pay_from(wallet, random.randint(2, 9))
    await client.refund(bought, 1)
    await client.until(f"/v1/payments/{payment['id']}", "succeeded")
    await client.refund(payment, random.randint(1, amount))
    await client.give_up(amount)


@asynccontextmanager
async def under_load(client: Client, wallet: str) -> AsyncIterator[None]:
    """Four shoppers go round and round as long as the block, and end their last rounds after it. Timers fire while their
    requests are on their way, as they do after a pause of the machine."""
    is_over = asyncio.Event()

    async def shop() -> None:
        while not is_over.is_set():
            await shop_around(client, wallet)

    load = [asyncio.create_task(shop()) for _ in range(4)]
    async with hurried(client.house):
        try:
            yield
            is_over.set()
            await asyncio.gather(*load)
        finally:
            await _end(load)


@asynccontextmanager
async def hurried(house: House) -> AsyncIterator[None]:
    """Time passes quickly inside the block."""

    async def hurry_for_ever() -> None:
        while True:
            await asyncio.sleep(0.7)
            await hurry(house)

    hurrying = asyncio.create_task(hurry_for_ever())
    try:
        yield
    finally:
        await _end([hurrying])


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancelled, and gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def settle(house: House) -> None:
    """Waits until nothing is open any more, with time passing quickly."""
    connection = await asyncpg.connect(house.told["database"])
    left: list[str] = []
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            left = [row[0] for row in await connection.fetch(IN_DOUBT)]
            if not left:
                return
            await connection.execute(HURRY)
            await connection.execute(LET_GO)
            await asyncio.sleep(0.4)
        raise AssertionError(f"still open: {Counter(left)}\n{house.log()[-3000:]}")
    finally:
        connection.terminate()


async def judge(client: Client) -> None:
    """Nothing is open; the provider's books, our ledger and what the merchant was told are the same; the chain is sound."""
    house = client.house
    await _all_said(client)
    await settle(house)
    books = await client.door("/books", method="GET")
    connection = await asyncpg.connect(house.told["database"])
    try:
        await _judge_books(connection, books)
        await _judge_wallets(connection)
        await _judge_acknowledged(connection, client.acknowledged)
        await _judge_webhooks(connection, house)
        report = await verify(connection, TABLES)
        assert report.is_sound, report.faults
    finally:
        connection.terminate()


async def _all_said(client: Client) -> None:
    """The provider has no callback left. Of money that comes after the close nothing else tells."""

    async def is_all_said() -> bool:
        callbacks = (await client.door("/books", method="GET"))["callbacks"]
        return all(callback["state"] != "waiting" for callback in callbacks)

    await until(is_all_said, "all callbacks taken")


async def _judge_books(connection: Any, books: dict[str, Any]) -> None:
    """Charges and refunds one by one, and their sum in the ledger."""
    rows = await connection.fetch(
        "SELECT a.id, a.channel_id, p.amount FROM attempt AS a JOIN payment AS p ON p.home = a.home AND p.id = a.root "
        "WHERE a.state IN ('succeeded', 'duplicate_paid')"
    )
    ours = {row["id"].hex: (row["channel_id"], row["amount"]) for row in rows}
    paid = [charge for charge in books["charges"] if charge["state"] in ("SUCCESS", "REFUND")]
    assert ours == {charge["out_trade_no"]: (charge["transaction_id"], charge["amount"]) for charge in paid}

    rows = await connection.fetch("SELECT id, channel_id, amount FROM refund WHERE state = 'succeeded'")
    returned = [refund for refund in books["refunds"] if refund["state"] == "SUCCESS"]
    channel_refunds = {row["id"].hex: (row["channel_id"], row["amount"]) for row in rows if row["channel_id"]}
    assert channel_refunds == {refund["out_refund_no"]: (refund["refund_id"], refund["amount"]) for refund in returned}
    receivable = await connection.fetchval(
        "SELECT coalesce(sum(debits_posted - credits_posted), 0)::bigint FROM account WHERE code = 4"
    )
    assert receivable == sum(charge["amount"] for charge in paid) - sum(refund["amount"] for refund in returned)
    sums = await connection.fetchrow(
        "SELECT coalesce(sum(debits_posted - credits_posted), 0) AS posted, "
        "coalesce(sum(debits_pending - credits_pending), 0) AS pending FROM account"
    )
    assert (sums["posted"], sums["pending"]) == (0, 0)


async def _judge_wallets(connection: Any) -> None:
    """What is in wallets is what came in, less what was paid from them, plus what came back."""
    balance = await connection.fetchval(
        "SELECT coalesce(sum(credits_posted - debits_posted), 0)::bigint FROM account WHERE code = 1"
    )
    expected = await connection.fetchval(
        "SELECT coalesce((SELECT sum(amount) FROM payment WHERE kind = 'topup' AND state = 'succeeded'), 0)::bigint "
        "- coalesce((SELECT sum(amount) FROM payment WHERE channel = 'wallet'), 0)::bigint "
        "+ coalesce((SELECT sum(r.amount) FROM refund AS r JOIN payment AS p ON p.home = r.home AND p.id = r.root "
        "WHERE p.channel = 'wallet' AND r.state = 'succeeded'), 0)::bigint"
    )
    assert balance == expected


async def _judge_acknowledged(connection: Any, acknowledged: list[dict[str, Any]]) -> None:
    """Everything that was answered with 201 is there, once, and what was final is what it was."""
    rows = await connection.fetch("SELECT id, kind, order_id, state FROM payment")
    stored = Counter((f"{'top' if row['kind'] == 'topup' else 'pay'}_{row['id'].hex}", row["order_id"]) for row in rows)
    states = {row["id"].hex: row["state"] for row in rows}
    orders = Counter((row["kind"], row["order_id"]) for row in rows)
    assert all(count == 1 for count in orders.values()), orders
    for made in acknowledged:
        if made["object"] in ("payment", "topup"):
            assert stored[made["id"], made["order_id"]] == 1, made
            assert states[made["id"][4:]] in STAYS.get(made["state"], states.values()), made
    rows = await connection.fetch("SELECT id, root, refund_id, state FROM refund")
    refunds = {f"rfd_{row['id'].hex}": row["state"] for row in rows}
    assert max(Counter(row["refund_id"] for row in rows).values(), default=1) == 1
    for made in acknowledged:
        if made["object"] == "refund":
            assert made["id"] in refunds, made
            assert made["state"] != "succeeded" or refunds[made["id"]] == "succeeded", made


STAYS = {"succeeded": ("succeeded",), "closed": ("closed", "late_refunded")}
"""What becomes of a payment that was said to be in that state."""
FINAL_AND_NOT_TOLD = """
SELECT p.kind || ' ' || p.state FROM payment AS p JOIN listening AS l USING (home)
WHERE p.state IN ('succeeded', 'closed', 'late_refunded') AND p.created_at > l.since AND NOT EXISTS
    (SELECT FROM webhook_delivery AS d WHERE d.event_root = p.id AND d.event_type = p.kind || '.' || p.state)
UNION ALL
SELECT 'refund ' || r.state FROM refund AS r JOIN listening AS l USING (home)
WHERE r.state = 'succeeded' AND r.cause = 'asked' AND r.created_at > l.since AND
    (SELECT count(*) FROM webhook_delivery AS d WHERE d.event_root = r.root AND d.event_type = 'refund.succeeded')
    <> (SELECT count(*) FROM refund AS o WHERE o.root = r.root AND o.state = 'succeeded' AND o.cause = 'asked')
"""
"""Final states that the merchant, who listens to everything, has no delivery of."""


async def _judge_webhooks(connection: Any, house: House) -> None:
    """The merchant's server really got every event that its endpoint was made for, each of the same content."""
    got: dict[str, bytes] = {}
    for received in house.receiver.received:
        assert got.setdefault(received.headers["webhook-id"], received.body) == received.body
    due = {row["event"] for row in await connection.fetch("SELECT event FROM webhook_delivery")}
    assert due <= got.keys(), due - got.keys()
    listening = "WITH listening AS (SELECT home, min(created_at) AS since FROM webhook_endpoint GROUP BY home)"
    not_told = await connection.fetch(listening + FINAL_AND_NOT_TOLD)
    assert not not_told, Counter(row[0] for row in not_told)
