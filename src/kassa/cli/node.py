"""One process of Kassa: an App with the API, the workers, or both, until it is told to stop."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

import click

from kassa.api.server import Api
from kassa.app import App
from kassa.cli.output import note
from kassa.errors import SettingInvalid
from kassa.merchants.orders import MEND, merchant_of_orders
from kassa.merchants.store import MerchantStore
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.observability.log import configure_logging
from kassa.settings import Settings
from kassa.workers import loops

READY_TIMEOUT_S = 30.0


@asynccontextmanager
async def api_of(app: App, workers: Collection[str]) -> AsyncIterator[Api]:
    """The API of a started App, with these workers beside it; ready to take a payment inside the block."""
    beside = loops.supervisor(app, workers)
    await loops.prepare_brokers(app)
    await warn_of_orders(app, workers)
    api = Api(app, idle_workers=lambda: loops.idle_workers(beside))
    async with AsyncExitStack() as stack:
        try:
            await api.start()
        except OSError as error:
            host, port = app.settings.host, app.settings.port
            raise click.ClickException(f"Cannot listen on {host}:{port} ({error.strerror}). Try --port 0.") from error
        # In this order at the end: take nothing new, let loops end.
        stack.push_async_callback(beside.stop)
        stack.push_async_callback(api.stop)
        beside.start()
        await _until_ready(api)
        yield api


async def warn_of_orders(app: App, workers: Collection[str]) -> None:
    """Says at the start, where somebody looks, that the requests of the queue will only wait; later the log does."""
    if "orders" not in workers or not app.brokers.of_topic(PAYMENT_ORDERS.name):
        return
    try:
        await merchant_of_orders(MerchantStore(app.pool), app.order_merchant)
    except SettingInvalid as error:
        note(f"! {error.detail}")
        note(MEND)


async def _until_ready(api: Api) -> None:
    deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_S
    while failing := [check for check in await api.checks() if check.required and not check.ok]:
        if asyncio.get_running_loop().time() > deadline:
            said = "; ".join(f"{check.name}: {check.says}" for check in failing)
            raise click.ClickException(f"Kassa does not become ready. {said}")
        await asyncio.sleep(0.02)


def stop_signal() -> asyncio.Event:
    """Set by SIGINT or SIGTERM."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    return told


def log_to_stderr(settings: Settings, style: Literal["json", "human"]) -> None:
    """Structured logs on standard error, from the level of the settings on."""
    configure_logging(style, logging.getLevelNamesMapping().get(settings.log_level.upper(), logging.INFO))
