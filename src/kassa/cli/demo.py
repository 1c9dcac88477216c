"""`kassa demo`: one payment from beginning to end, and what belongs to it, told and checked.

It is a merchant's program: it starts `kassa up` on a temporary directory, uses `kassa.client`, and runs a small server
that receives webhooks. Whatever it claims it has checked; the first claim that is not true ends it with exit code 1.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import click
import httpx
import segno
from standardwebhooks import Webhook, WebhookVerificationError

from kassa.cli.options import merchant_id, opened, run
from kassa.cli.output import json_option, money, show
from kassa.client import AsyncKassa, Entry, Line, Payment, Refund, Topup
from kassa.db.embedded import temporary_directory
from kassa.errors import KassaError
from kassa.journal import verify as proof
from kassa.ledger.chart import NAMES, Code
from kassa.tables import TABLES

WAIT_S = 15.0
"""For a callback or a webhook. They take well under a second; a busy machine takes longer."""
START_S = 90.0
LOOK_S = 0.02
PRICE, REFUNDED, TOPPED_UP, WALLET_PRICE = 1280, 300, 5000, 1200
FEE_PPM = 6000
CURRENCY = "CNY"

Found = TypeVar("Found")


@click.command()
@json_option
def demo(as_json: bool) -> None:
    """A short tour on a temporary directory, each claim checked; exit code 0 only if all of them are true."""
    tour = Tour(is_quiet=as_json)
    started = time.monotonic()
    with temporary_directory("kassa-demo-") as directory:
        run(_stoppable(_tour(tour, directory)))
    seconds = round(time.monotonic() - started, 1)
    document = {"ok": True, "seconds": seconds, "claims": tour.claims}

    def people() -> None:
        print(f"\n{len(tour.claims)} claims, each one checked, in {seconds} s.")
        print("`kassa up` keeps it running: then it is yours.")

    show(document, as_json, people)


async def _stoppable(tour: Coroutine[Any, Any, None]) -> None:
    """SIGTERM ends the tour in order too, so that nothing that it started stays behind."""
    task = asyncio.ensure_future(tour)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        raise click.Abort from None


class Tour:
    """What is told, and what was checked."""

    def __init__(self, *, is_quiet: bool) -> None:
        self.claims: list[str] = []
        self._is_quiet = is_quiet
        if not is_quiet and hasattr(sys.stdout, "reconfigure"):
            # A terminal without Unicode shows question marks; that is no reason to fail.
            sys.stdout.reconfigure(errors="replace")

    def chapter(self, title: str) -> None:
        """A new part of the tour."""
        self.say(f"\n── {title} " + "─" * max(3, 74 - len(title)))

    def say(self, text: str) -> None:
        """A line for people."""
        if not self._is_quiet:
            print(text, flush=True)

    def claim(self, sentence: str, is_true: bool, evidence: object = None) -> None:
        """Something that is told because it was checked. Raises ClickException when it is not true."""
        if not is_true:
            raise click.ClickException(f"This should be true and is not: {sentence} ({evidence})")
        self.claims.append(sentence)
        self.say(f"  ✓ {sentence}")


@dataclass
class Shop:
    """Everything that the tour talks to."""

    up: dict[str, Any]
    kassa: AsyncKassa
    app: Any
    http: httpx.AsyncClient
    inbox: "Inbox"
    secret: str = ""
    seen: set[str] = field(default_factory=set)

    @property
    def sandbox(self) -> str:
        return str(self.up["sandboxes"]["wechat"]["base_url"])

    async def books(self) -> dict[str, Any]:
        """The provider's own books."""
        books: dict[str, Any] = (await self.http.get(f"{self.sandbox}/_sandbox/books")).json()
        return books

    async def payer_pays(self, code_url: str) -> None:
        """The payer scans the code and confirms."""
        answer = await self.http.post(f"{self.sandbox}/_sandbox/pay", json={"code_url": code_url})
        answer.raise_for_status()


async def _tour(tour: Tour, directory: Path) -> None:
    tour.say("Kassa starts: PostgreSQL, API and workers, and a WeChat Pay sandbox, each a process of its own …")
    async with (
        _running(directory) as up,
        AsyncKassa(up["api_key"], up["api"]) as kassa,
        opened(str(directory / "house"), None) as app,
        httpx.AsyncClient(timeout=10.0, trust_env=False) as http,
        receiving() as inbox,
    ):
        await app.merchants.set_policies(merchant_id(up["merchant"]), {"fee_ppm": FEE_PPM})
        shop = Shop(up, kassa, app, http, inbox)
        await _listen(tour, shop)
        payment = await _take(tour, shop)
        await _paid(tour, shop, payment)
        await _refund(tour, shop, payment)
        wallet = await _topup(tour, shop)
        await _pay_from_wallet(tour, shop, wallet)
        await _prove(tour, shop)


# The chapters


async def _listen(tour: Tour, shop: Shop) -> None:
    endpoint = await shop.kassa.webhook_endpoints.create(url=shop.inbox.url, events=["*"])
    shop.secret = endpoint.secret or ""
    tour.say(f"API at {shop.up['api']}, the shop's own server for webhooks at {shop.inbox.url}")


async def _take(tour: Tour, shop: Shop) -> Payment:
    tour.chapter("A payment is asked for")
    order: dict[str, Any] = {"order_id": "123456", "amount": PRICE, "currency": CURRENCY}
    order |= {"channel": "wechat", "method": "native", "description": "Two coffees"}
    tour.say(f"  POST /v1/payments  {json.dumps(order)}")
    payment = await shop.kassa.payments.create(**order, idempotency_key="demo-1")
    tour.say(f"  → {payment.id}, {payment.state}")
    action = payment.next_action
    tour.claim("Kassa answers with what the payer needs", action is not None and bool(action.code_url), payment)
    again = await shop.kassa.payments.create(**order, idempotency_key="demo-1")
    tour.claim("the same request with the same key is the same payment", again.id == payment.id, again.id)

    tour.chapter("Kassa asks WeChat Pay, signed")
    call = _first(await shop.kassa.payments.timeline(payment.id), "request")
    tour.say(f"  {call.text}")
    charge = _charge(await shop.books(), payment)
    tour.claim(
        "the provider took the signed request: its books have the order, not paid",
        charge["amount"] == PRICE and charge["state"] == "NOTPAY",
        charge,
    )

    tour.chapter("The payer sees a QR code")
    tour.say(_drawn(_code(payment)))
    return payment


async def _paid(tour: Tour, shop: Shop, payment: Payment) -> None:
    tour.chapter("The payer pays; the provider calls back, signed")
    await shop.payer_pays(_code(payment))
    paid = await _until(lambda: shop.kassa.payments.get(payment.id), lambda now: now.state == "succeeded")
    story = await shop.kassa.payments.timeline(payment.id)
    tour.say(f"  {_first(story, 'callback').text}")
    tour.claim("the payment succeeded", paid.state == "succeeded" and paid.succeeded_at is not None, paid)
    charge = _charge(await shop.books(), payment)
    tour.claim("the provider's books say the same", charge["state"] == "SUCCESS", charge)
    fee = round(PRICE * FEE_PPM / 1_000_000)
    postings = [entry for entry in story if entry.kind == "posting"]
    for posting in postings:
        tour.say(f"  {posting.text}")
    tour.claim(
        f"the ledger has {money(PRICE, CURRENCY)}: {money(PRICE - fee, CURRENCY)} for the shop and {money(fee, CURRENCY)} "
        "of fee",
        {posting.credit: posting.amount for posting in postings} == {"merchant_payable": PRICE - fee, "fee_income": fee}
        and paid.fee == fee,
        postings,
    )
    await _hears(tour, shop, "payment.succeeded", payment.id)


async def _refund(tour: Tour, shop: Shop, payment: Payment) -> None:
    tour.chapter(f"A part of it goes back: {money(REFUNDED, CURRENCY)}")
    refund = await shop.kassa.refunds.create(payment.id, amount=REFUNDED, refund_id="r-1", reason="cold coffee")
    tour.say(f"  POST /v1/payments/{payment.id}/refunds → {refund.id}, {refund.state}")
    done: Refund = await _until(lambda: shop.kassa.refunds.get(refund.id), lambda now: now.state == "succeeded")
    now = await shop.kassa.payments.get(payment.id)
    tour.claim("the refund succeeded", done.state == "succeeded" and now.amount_refunded == REFUNDED, done)
    theirs = next(one for one in (await shop.books())["refunds"] if one["out_refund_no"] == refund.number)
    tour.claim("the provider gave back as much", theirs["amount"] == REFUNDED and theirs["state"] == "SUCCESS", theirs)
    await _hears(tour, shop, "refund.succeeded", payment.id)


async def _topup(tour: Tour, shop: Shop) -> str:
    tour.chapter(f"A user tops up a wallet with {money(TOPPED_UP, CURRENCY)}")
    wallet = await shop.kassa.wallets.create(user="u-77", currency=CURRENCY)
    topup: Topup = await shop.kassa.topups.create(
        order_id="t-1", wallet=wallet.id, amount=TOPPED_UP, currency=CURRENCY, channel="wechat", method="native"
    )
    await shop.payer_pays(_code(topup))
    await _until(lambda: shop.kassa.topups.get(topup.id), lambda now: now.state == "succeeded")
    full = await shop.kassa.wallets.get(wallet.id)
    tour.claim(f"the wallet holds {money(TOPPED_UP, CURRENCY)}", full.balance == full.available == TOPPED_UP, full)
    await _hears(tour, shop, "topup.succeeded", topup.id)
    return wallet.id


async def _pay_from_wallet(tour: Tour, shop: Shop, wallet: str) -> None:
    tour.chapter(f"The user pays {money(WALLET_PRICE, CURRENCY)} from the wallet")
    payment = await shop.kassa.payments.create(
        order_id="123457", amount=WALLET_PRICE, currency=CURRENCY, channel="wallet", wallet=wallet
    )
    tour.claim("it is final at once", payment.state == "succeeded", payment)
    left = (await shop.kassa.wallets.get(wallet)).balance
    tour.claim(f"the wallet holds {money(left, CURRENCY)}", left == TOPPED_UP - WALLET_PRICE, left)
    lines = [line async for line in shop.kassa.wallets.statement(wallet)][::-1]
    for line in lines:
        tour.say(
            f"  {line.version}. {line.kind:<10}{money(line.amount, CURRENCY):>14}{money(line.balance, CURRENCY):>14}"
        )
    tour.claim("its statement has every step, and adds up", _adds_up(lines, left), lines)
    await _hears(tour, shop, "payment.succeeded", payment.id)
    try:
        await shop.kassa.payments.create(
            order_id="123458", amount=left + 1, currency=CURRENCY, channel="wallet", wallet=wallet
        )
    except KassaError as error:
        tour.claim("more than there is, is refused", error.code == "wallet.insufficient_funds", error)
    else:
        tour.claim("more than there is, is refused", False)


async def _prove(tour: Tour, shop: Shop) -> None:
    tour.chapter("The books")
    lines = await shop.app.ledger.trial_balance()
    total = 0
    for line in lines:
        balance = line.credits_posted - line.debits_posted
        total += balance
        tour.say(f"  {NAMES[Code(line.code)]:<20}{money(balance, line.currency):>16}")
    tour.say(f"  {'Σ':<20}{money(total, CURRENCY):>16}")
    tour.claim("the trial balance is zero", bool(lines) and total == 0, lines)
    books = await shop.books()
    theirs = sum(one["amount"] - one["refunded"] for one in books["charges"] if one["state"] in ("SUCCESS", "REFUND"))
    [balance] = await shop.kassa.balances.get()
    tour.claim("the provider owes us what its own books say", balance.receivable == theirs, (balance, theirs))
    async with shop.app.pool.acquire() as connection:
        report = await proof.verify(connection, TABLES)
    tour.claim(
        f"the chain of {report.batches} commits verifies: nothing was changed afterwards",
        report.is_sound,
        report.faults,
    )


# What the chapters need


async def _hears(tour: Tour, shop: Shop, kind: str, root: str) -> None:
    """The shop's server is told, and the standard's own library says that it was us."""

    async def arrived() -> "Letter | None":
        return next((one for one in shop.inbox.letters if one.is_about(kind, root) and one.id not in shop.seen), None)

    letter = await _until(arrived, lambda found: found is not None)
    if letter is None:
        raise click.ClickException(f"No webhook {kind} for {root} came.")
    shop.seen.add(letter.id)
    try:
        Webhook(shop.secret).verify(letter.body, letter.headers)
        is_ours = True
    except WebhookVerificationError:
        is_ours = False
    tour.claim(f"the shop got the webhook {kind}, and the standard's library verifies it", is_ours, letter.headers)


async def _until(look: Callable[[], Awaitable[Found]], is_so: Callable[[Found], bool]) -> Found:
    """Looks until it is so; the last look when it does not become so in time."""
    deadline = time.monotonic() + WAIT_S
    while True:
        found = await look()
        if is_so(found) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(LOOK_S)


def _first(story: tuple[Entry, ...], kind: str) -> Entry:
    found = next((entry for entry in story if entry.kind == kind), None)
    if found is None:
        raise click.ClickException(f"The story of the payment has no {kind}.")
    return found


def _charge(books: dict[str, Any], payment: Payment) -> dict[str, Any]:
    """The order in the provider's books, by the number that the attempt has there."""
    number = payment.attempts[0].number
    charge: dict[str, Any] = next((one for one in books["charges"] if one["out_trade_no"] == number), {})
    if not charge:
        raise click.ClickException(f"The provider's books have no order {number}.")
    return charge


def _code(payment: Payment) -> str:
    return (payment.next_action.code_url if payment.next_action else None) or ""


def _drawn(text: str) -> str:
    """A QR code of half blocks, dark on light whatever the terminal's colours are."""
    rows = [list(row) for row in segno.make(text, error="l", micro=False).matrix_iter(border=2)]
    rows += [[0] * len(rows[0])] * (len(rows) % 2)
    blocks = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}
    return "\n".join(
        "  " + "".join(blocks[upper & 1, lower & 1] for upper, lower in zip(rows[i], rows[i + 1], strict=True))
        for i in range(0, len(rows), 2)
    )


def _adds_up(lines: list[Line], balance: int) -> bool:
    """Versions without a gap, each balance the one before plus the amount, up to the balance of now."""
    steps = [(line.version, line.balance) for line in lines]
    return steps == list(enumerate(accumulate(line.amount for line in lines), 1)) and lines[-1].balance == balance


@asynccontextmanager
async def _running(directory: Path) -> AsyncIterator[dict[str, Any]]:
    """`kassa up` as a user starts it, and its one line."""
    house, log = directory / "house", directory / "log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kassa.cli.main", "up", "--dir", str(house), "--port", "0", "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=1 << 20,
            # Ctrl-C is for the tour, which then stops the house in order.
            start_new_session=True,
        )
    try:
        if process.stdout is None:
            raise click.ClickException("kassa up has no output.")
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        if not line:
            raise click.ClickException(f"kassa up does not start:\n{log.read_text(errors='replace')}")
        yield json.loads(line)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


@dataclass(frozen=True)
class Letter:
    """A webhook as it arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers.get("webhook-id", "")

    def is_about(self, kind: str, root: str) -> bool:
        event = json.loads(self.body)
        return bool(event["type"] == kind and event["root"] == root)


@dataclass
class Inbox:
    """The shop's own server: it takes webhooks and keeps them."""

    url: str = ""
    letters: list[Letter] = field(default_factory=list)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            pairs = [line.partition(":") for line in head.split("\r\n")[1:] if line]
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.letters.append(Letter(headers, body))
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
            pass  # Not a webhook: nothing is kept, nothing is answered, and Kassa would send it again.
        finally:
            writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Inbox]:
    """A server for webhooks that lives as long as the block."""
    inbox = Inbox()
    server = await asyncio.start_server(inbox.take, "127.0.0.1", 0)
    inbox.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/webhooks"
    try:
        yield inbox
    finally:
        server.close()
        await server.wait_closed()
