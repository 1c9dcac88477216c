"""`kassa doctor`: checks each part of a set-up, says what to do, and prints each setting with its source."""

import asyncio
import logging
import shutil
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import asyncpg
import click
import httpx
import msgspec

from kassa.channels.registry import open_channel
from kassa.cli import directory as places
from kassa.cli.database import database
from kassa.cli.options import place_options, run
from kassa.cli.output import json_option, note, show, table
from kassa.db.migrate import pending
from kassa.db.pool import connect, without_password
from kassa.errors import BrokerUnreachable, KassaError, QueueNotFound, SettingInvalid
from kassa.ledger.store import LedgerStore
from kassa.merchants.orders import MEND, merchant_of_orders
from kassa.merchants.store import MerchantStore
from kassa.merchants.vault import Vault
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.brokers import Broker
from kassa.messaging.topology import PAYMENT_ORDERS, Declaration
from kassa.messaging.wake import Wakeups
from kassa.observability.log import configure_logging
from kassa.settings import Loaded, Origin, Settings, anchor_key, load, masked, secrets_key

CLOCK_S_MAX = 5.0
"""Signed requests are refused by providers past some minutes; at seconds something is wrong with the time service."""
FREE_BYTES_MIN = 1_000_000_000
ASK_TIMEOUT_S = 3.0
BROKER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One part, how it is, and what to do about it. level: ok, warning or failure."""

    part: str
    level: str
    says: str
    do: str = ""


@click.command()
@place_options
@json_option
def doctor(directory: str | None, database_url: str | None, as_json: bool) -> None:
    """Checks a set-up, running or stopped. Exit code 1 when something must be mended before a payment can be taken."""
    configure_logging(level=logging.ERROR)
    loaded = load({"database_url": database_url}, directory=directory)
    findings = run(_findings(loaded))
    origins = _effective(loaded)
    failures = [finding for finding in findings if finding.level == "failure"]
    document = {
        "ok": not failures,
        "checks": [vars(finding) for finding in findings],
        "settings": [origin._asdict() for origin in origins],
    }

    def people() -> None:
        signs = {"ok": "ok", "warning": "!", "failure": "FAIL"}
        table(("", "part", "", "what to do"), [(signs[one.level], one.part, one.says, one.do) for one in findings])
        table(("setting", "value", "from"), origins)

    show(document, as_json, people)
    if failures:
        raise click.ClickException(
            f"{len(failures)} thing(s) to mend first: {', '.join(one.part for one in failures)}."
        )


def _effective(loaded: Loaded) -> list[Origin]:
    """The settings as they count: where nothing is said, what `kassa up` remembers in DIR goes before the default."""
    place = Path(loaded.settings.dir)
    remembered = places.recall(place)
    said = {
        "port": remembered.port, "database_url": remembered.database_url, "brokers": remembered.brokers or None,
        "order_queue": remembered.order_queue,
    }  # fmt: skip
    return [
        Origin(origin.name, masked(origin.name, said[origin.name]), str(place / "up.json"))
        if origin.source == "default" and said.get(origin.name) is not None
        else origin
        for origin in loaded.origins
    ]


async def _findings(loaded: Loaded) -> list[Finding]:
    settings = loaded.settings
    found = [_directory(settings), _secrets(settings), _anchors(settings)]
    try:
        with database(Path(settings.dir), settings.database_url, note) as reached:
            found += [finding async for finding in _database(reached.url, settings)]
    except KassaError as error:
        found.append(Finding("database", "failure", error.detail, "Start it, or correct the URL."))
    remembered = places.recall(Path(settings.dir))
    as_run = msgspec.structs.replace(settings, port=remembered.port or settings.port)
    found += [await _api(as_run), _callbacks(as_run), _webhooks(settings, is_up=remembered.port is not None)]
    return found


def _directory(settings: Settings) -> Finding:
    place = Path(settings.dir).absolute()
    if not place.is_dir():
        return Finding("directory", "warning", f"{place} does not exist.", "`kassa up` makes it.")
    private = [place / name for name in ("up.json", settings.secrets_key_file, settings.anchor_key_file, "kassa.toml")]
    seen = [file.name for file in private if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077]
    if seen and seen != ["kassa.toml"]:
        return Finding("directory", "failure", f"Others can read {', '.join(seen)} in {place}.", "chmod 600 them.")
    free = shutil.disk_usage(place).free
    if free < FREE_BYTES_MIN:
        return Finding("directory", "warning", f"{free // 1_000_000} MB are free at {place}.", "Make room.")
    return Finding("directory", "ok", str(place))


def _secrets(settings: Settings) -> Finding:
    try:
        secrets_key(settings)
    except KassaError as error:
        return Finding("secrets key", "failure", error.detail, "Make one with `openssl rand -base64 32`; keep a copy.")
    return Finding("secrets key", "ok", "It is there. Keep a copy apart from the database's.")


def _anchors(settings: Settings) -> Finding:
    try:
        key = anchor_key(settings)
    except KassaError as error:
        return Finding("anchor key", "failure", error.detail, "Put back the file of before.")
    if key is None:
        advice = f"openssl rand -base64 32 > {settings.path(settings.anchor_key_file)}; chmod 600 it."
        return Finding("anchor key", "warning", "None: `kassa ledger verify` proves less.", advice)
    return Finding("anchor key", "ok", "The chain is anchored.")


async def _database(url: str, settings: Settings) -> AsyncIterator[Finding]:
    try:
        connection = await connect(url, application="kassa doctor")
    except KassaError as error:
        yield Finding("database", "failure", error.detail, "Start it, or correct the URL.")
        return
    try:
        yield Finding(
            "database", "ok", f"PostgreSQL {connection.get_server_version().major} at {without_password(url)}."
        )
        yield await _durable(connection)
        yield await _clock(connection)
        missing = await pending(connection)
        if missing:
            yield Finding("migrations", "failure", f"{len(missing)} are missing.", "kassa migrate")
            return
        yield Finding("migrations", "ok", "Up to date.")
    except KassaError as error:
        yield Finding("migrations", "failure", error.detail)
        return
    finally:
        await connection.close()
    async for finding in _contents(url, settings):
        yield finding
    async for finding in _brokers(url, settings):
        yield finding


async def _durable(connection: Any) -> Finding:
    rows = await connection.fetch(
        "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')"
    )
    off = sorted(row["name"] for row in rows if row["setting"] == "off")
    if off:
        return Finding(
            "durability", "failure", f"{', '.join(off)} is off: what was acknowledged can be lost.", "Turn it on."
        )
    return Finding("durability", "ok", "What is acknowledged is on disk.")


async def _clock(connection: Any) -> Finding:
    before = datetime.now(UTC)
    theirs: datetime = await connection.fetchval("SELECT clock_timestamp()")
    apart_s = abs((theirs - before).total_seconds())
    if apart_s > CLOCK_S_MAX:
        return Finding(
            "clock",
            "failure",
            f"The database's clock is {apart_s:.0f} s away from ours.",
            "Run a time service on both.",
        )
    return Finding("clock", "ok", "Ours and the database's agree.")


async def _contents(url: str, settings: Settings) -> AsyncIterator[Finding]:
    """Merchants, their keys and channels, and whether the books balance."""
    async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
        store = MerchantStore(pool)
        merchants = await store.merchants(None, 100)
        if not merchants:
            yield Finding("merchants", "failure", "There is none.", "kassa merchant create NAME, then key create.")
        for merchant in merchants:
            name = f"mch_{merchant.id}"
            active = [key for key in await store.keys(merchant.home) if key.state == "active"]
            if not active:
                yield Finding(name, "warning", "It has no active API key.", f"kassa key create --merchant {name}")
            for account in await store.channel_accounts(merchant.home):
                yield _channel(name, account, settings)
        if merchants:
            yield Finding("merchants", "ok", f"{len(merchants)}" + (" or more" if len(merchants) == 100 else ""))
        sums: dict[str, int] = {}
        for line in await LedgerStore(pool).trial_balance():
            sums[line.currency] = sums.get(line.currency, 0) + line.credits_posted - line.debits_posted
        wrong = [f"{total} {currency}" for currency, total in sums.items() if total]
        if wrong:
            yield Finding("ledger", "failure", f"The books do not balance: {', '.join(wrong)}.", "kassa ledger verify")
        else:
            yield Finding("ledger", "ok", "The books balance.")


async def _brokers(url: str, settings: Settings) -> AsyncIterator[Finding]:
    """Each broker: whether it answers and has what Kassa needs there. Nothing is made at it."""
    remembered = places.recall(Path(settings.dir))
    try:
        named = read_brokers(settings.brokers or remembered.brokers)
    except KassaError as error:
        yield Finding("brokers", "failure", error.detail, "Correct KASSA_BROKERS, or `brokers` in kassa.toml.")
        return
    declaration = cast(Declaration, settings.order_queue or remembered.order_queue or "durable")
    orders = PAYMENT_ORDERS._replace(declaration=declaration)
    async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
        for one in named:
            broker = Broker(
                one, pool, Wakeups(lambda: connect(url, application="kassa doctor")), orders, topology="verify"
            )
            yield await _broker(broker)
        if any(PAYMENT_ORDERS.name in one.topics for one in named):
            yield await _orders(MerchantStore(pool), settings.order_merchant or remembered.merchant)


async def _orders(merchants: MerchantStore, name: str | None) -> Finding:
    """Whether requests over the queue are done, or wait. name: `order_merchant`; `kassa up` takes its own without."""
    part = f"queue {PAYMENT_ORDERS.name}"
    try:
        merchant = await merchant_of_orders(merchants, name)
    except SettingInvalid as error:
        # Every broker carries this topic unless told otherwise, so who names no merchant may not use it at all.
        return Finding(part, "warning" if name is None else "failure", error.detail, MEND)
    return Finding(part, "ok", f"It makes payments of mch_{merchant.id}.")


async def _broker(broker: Broker) -> Finding:
    part, carries = f"broker {broker.name}", f"{broker.shown} carries {', '.join(broker.topics)}."
    try:
        async with asyncio.timeout(BROKER_TIMEOUT_S):
            await broker.binder()
    except (BrokerUnreachable, TimeoutError) as error:
        says = f"{broker.shown} cannot be reached ({error})."
        return Finding(part, "failure", says, "Start it, or correct its URL. Payments go on; what is for it waits.")
    except QueueNotFound as error:
        return Finding(part, "warning", error.detail, "`kassa up` and `kassa worker` make what is missing.")
    except KassaError as error:
        return Finding(part, "failure", error.detail)
    finally:
        await broker.close()
    return Finding(part, "ok", carries)


def _channel(name: str, account: Any, settings: Settings) -> Finding:
    part = f"{name} {account.channel}"
    if account.state != "active":
        return Finding(part, "warning", f"It is {account.state}.")
    try:
        sealed = Vault(secrets_key(settings)).open(account.home, account.channel, account.credentials)
        reached = open_channel(account.channel, msgspec.json.decode(sealed))
    except KassaError as error:
        return Finding(part, "failure", error.detail, f"kassa channel set {account.channel} --merchant {name} …")
    return Finding(part, "ok", f"Its credentials are complete; {reached.base_url}")


async def _api(settings: Settings) -> Finding:
    """The API of this set-up, if one listens."""
    url = f"http://{settings.host}:{settings.port}/readyz"
    try:
        async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S, trust_env=False) as http:
            answer = await http.get(url)
    except httpx.HTTPError:
        return Finding("API", "warning", f"Nothing answers at {url}.", "`kassa up` or `kassa serve` starts it.")
    if answer.status_code == 200:
        return Finding("API", "ok", f"Ready at {url}.")
    return Finding("API", "failure", f"{url} says: {answer.text[:300]}", "See what it names, and its log.")


def _callbacks(settings: Settings) -> Finding:
    host = urlsplit(settings.base_url).hostname or ""
    if host in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
        return Finding(
            "callbacks",
            "warning",
            f"Providers are told {settings.base_url}, which only this machine reaches: good for sandboxes.",
            "Set KASSA_PUBLIC_URL to the https address of your reverse proxy.",
        )
    if not settings.base_url.startswith("https://"):
        return Finding("callbacks", "failure", f"{settings.base_url} is not https.", "Providers refuse it; use https.")
    return Finding("callbacks", "ok", settings.base_url)


def _webhooks(settings: Settings, *, is_up: bool) -> Finding:
    if is_up:
        return Finding(
            "webhooks",
            "warning",
            "Under `kassa up` they may go to private addresses.",
            "`kassa serve` does not let them.",
        )
    if settings.webhook_allow_private:
        return Finding(
            "webhooks", "warning", "They may go to private addresses (SSRF).", "Unset KASSA_WEBHOOK_ALLOW_PRIVATE."
        )
    return Finding("webhooks", "ok", "They go to public addresses only.")
