"""A shop with a real sandbox behind its channel: the provider's signed wire, its own books, faults on demand."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

import aiohttp
import asyncpg
import msgspec

from kassa.channels.channel import Charges
from kassa.channels.runner import Runner
from kassa.channels.sandbox import http
from kassa.channels.wechat import WeChatPay, read_account
from kassa.clock import SystemClock
from kassa.ids import Id, new_id
from kassa.journal.change import OnceKey
from kassa.journal.memory import MemoryJournal
from kassa.journal.writer import PostgresJournal
from kassa.ledger.chart import NAMES, Code
from kassa.merchants.records import Merchant
from kassa.messaging.work import FiredTimer, TimerWork
from kassa.payments.memory import MemoryPayments
from kassa.payments.model import Order
from kassa.payments.records import REFUND
from kassa.payments.refunds import Ask
from kassa.payments.service import Answer, Payments
from kassa.payments.store import PaymentStore
from kassa.workers.payments import Timers

HOME = 7


class Books(Timers, Protocol):
    """How a test looks at what is kept, whichever journal keeps it; also its timers."""

    async def balances(self) -> dict[str, int]: ...
    async def events(self, root: Id) -> list[str]: ...
    async def unarmed(self) -> list[tuple[int, Id]]: ...
    async def refunds(self) -> list[str]: ...
    async def hurry(self) -> None: ...
    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]: ...


class MemoryBooks:
    """Looks into the memory journal; also its timers."""

    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal

    async def balances(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for key, account in self._journal.accounts.items():
            name = NAMES[Code(key.code)]
            totals[name] = totals.get(name, 0) + account.balance
        return {name: total for name, total in totals.items() if total}

    async def events(self, root: Id) -> list[str]:
        return [event.type for event in self._journal.events if event.root == root]

    async def unarmed(self) -> list[tuple[int, Id]]:
        return MemoryPayments(self._journal).unarmed()

    async def refunds(self) -> list[str]:
        return [f"rfd_{row.id}" for row in self._journal.all_of(REFUND)]

    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]:
        return await MemoryPayments(self._journal).channels_of(subjects)

    async def hurry(self) -> None:
        for timer in self._journal.timers.values():
            timer.due = datetime.now(UTC)

    async def claim_timers(self, kinds: Sequence[str], limit: int) -> list[FiredTimer]:
        due = [
            timer for timer in self._journal.timers.values() if timer.kind in kinds and timer.due <= datetime.now(UTC)
        ]
        for timer in due[:limit]:
            # The lease.
            timer.due += timedelta(minutes=1)
        return [
            FiredTimer(timer.home, timer.root, timer.entity, timer.kind, timer.generation, 0, timer.due)
            for timer in due[:limit]
        ]

    async def retry_timer(self, fired: FiredTimer, delay_s: float | None = None, error: str | None = None) -> None:
        raise AssertionError(error)

    async def postpone_timers(self, fired: Sequence[FiredTimer], delay_s: float) -> None:
        raise AssertionError(fired)


class PostgresBooks(TimerWork):
    """Looks into the database; also its timers."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        super().__init__(pool)
        self.pool = pool

    async def balances(self) -> dict[str, int]:
        rows = await self.pool.fetch(
            "SELECT code, sum(credits_posted - debits_posted)::bigint AS total FROM account GROUP BY code"
        )
        return {NAMES[Code(row["code"])]: row["total"] for row in rows if row["total"]}

    async def events(self, root: Id) -> list[str]:
        rows = await self.pool.fetch("SELECT type FROM event WHERE root = $1 ORDER BY sequence", root)
        return [row["type"] for row in rows]

    async def unarmed(self) -> list[tuple[int, Id]]:
        return await PaymentStore(self.pool).unarmed()

    async def refunds(self) -> list[str]:
        return [f"rfd_{row['id'].hex}" for row in await self.pool.fetch("SELECT id FROM refund ORDER BY id")]

    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]:
        return await PaymentStore(self.pool).channels_of(subjects)

    async def hurry(self) -> None:
        await self.pool.execute("UPDATE timer SET due = now(), leased_until = NULL")


class Line:
    """The merchant's one channel; `cut` and `mend` change where it leads."""

    def __init__(self, channel: Charges, base_url: str) -> None:
        self.channel = channel
        self.base_url = base_url

    async def for_merchant(self, home: int, channel: str) -> tuple[Charges, str]:
        return self.channel, self.base_url

    def learn(self, home: int, channel: str, fresh: Charges) -> None:
        self.channel = fresh


class Shop:
    """A merchant, Kassa's payments, and the provider."""

    def __init__(
        self,
        journal: MemoryJournal | PostgresJournal,
        books: Books,
        reads: MemoryPayments | PaymentStore,
        sandbox: Mapping[str, str],
        runner: Runner,
        **policies: Any,
    ) -> None:
        self.books = books
        self.reads = reads
        self.sandbox = sandbox
        self.line = Line(WeChatPay(read_account(sandbox_account(sandbox))), sandbox["base_url"])
        self.merchant = Merchant(
            **{
                "home": HOME, "id": new_id(), "version": 0, "sequence": 0, "state": "active", "name": "Shop",
                "created_at": datetime.now(UTC), "fee_ppm": 10_000, **policies,
            }
        )  # fmt: skip
        self.payments = Payments(journal, reads, self.line, runner, SystemClock(), "http://127.0.0.1:1")
        self.callbacks: list[int] = []

    async def receive(self, request: http.Request) -> http.Answer:
        """What the provider posts to us, handled as the API does it."""
        answer = await self.payments.handle_callback(HOME, "wechat", request.headers, request.body)
        self.callbacks.append(answer.status)
        return http.Answer(answer.status, answer.headers, answer.body)

    def listen_at(self, url: str) -> None:
        """Where the provider reaches us from now on."""
        self.payments._public_url = url

    async def order(self, amount: int = 1000, **fields: Any) -> dict[str, Any]:
        """A payment by QR code."""
        order = Order(
            **{
                "order_id": new_id(), "amount": amount, "currency": "CNY", "channel": "wechat", "method": "native",
                "description": "Two coffees", **fields,
            }
        )  # fmt: skip
        return read(await self.payments.create(self.merchant, order, once()))

    async def refund(self, payment: str, amount: int | None) -> dict[str, Any]:
        """A refund."""
        ask = Ask(id=new_id(), refund_id=new_id(), amount=amount)
        return read(await self.payments.refund(self.merchant, inner(payment), ask, once()))

    async def get(self, payment: str) -> dict[str, Any]:
        """A payment as it stands."""
        return read(await self.payments.get_payment(HOME, inner(payment)))

    async def get_refund(self, refund: str) -> dict[str, Any]:
        """A refund as it stands."""
        return read(await self.payments.get_refund(HOME, inner(refund)))

    async def until(self, payment: str, state: str) -> dict[str, Any]:
        """The payment, once it has come to a state; callbacks take a moment."""
        await eventually(partial(self._is_at, self.get, payment, state))
        return await self.get(payment)

    async def until_refund(self, refund: str, state: str) -> dict[str, Any]:
        """The refund, once it has come to a state."""
        await eventually(partial(self._is_at, self.get_refund, refund, state))
        return await self.get_refund(refund)

    async def _is_at(self, get: Callable[[str], Awaitable[dict[str, Any]]], name: str, state: str) -> bool:
        return bool((await get(name))["state"] == state)

    async def provider(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """The sandbox's control door."""
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{self.sandbox['base_url']}/_sandbox{path}", json=body) as response,
        ):
            assert response.status < 300, await response.text()
            return await response.json(content_type=None)

    async def payer_pays(self, payment: Mapping[str, Any], **more: Any) -> None:
        """The payer scans and pays."""
        await self.provider("/pay", {"out_trade_no": payment["attempts"][-1]["number"], **more})

    async def fault(self, on: str, fault: str, times: int = 1, **more: Any) -> None:
        """The provider misbehaves."""
        await self.provider("/faults", {"on": on, "fault": fault, "times": times, **more})


def sandbox_account(sandbox: Mapping[str, str]) -> dict[str, str]:
    """The credentials as a merchant would set them: public-key mode."""
    names = ("mchid", "appid", "merchant_serial_no", "merchant_private_key_pem", "apiv3_key", "base_url")
    return {name: sandbox[name] for name in names} | {
        "platform_public_key_id": sandbox["platform_public_key_id"],
        "platform_public_key_pem": sandbox["platform_public_key_pem"],
    }


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Returns as soon as it holds. Fails after a minute."""
    for _ in range(3000):
        if await holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("It did not come to pass.")


def once() -> OnceKey:
    """A fresh idempotency key."""
    return OnceKey("test", new_id(), b"digest")


def inner(name: str) -> Id:
    """The id inside a public name."""
    return Id(name.partition("_")[2])


def read(answer: Answer) -> dict[str, Any]:
    """The object of an answer."""
    found: dict[str, Any] = msgspec.json.decode(answer.body)
    return found
