"""The parts for production, each in as many processes as it needs: the API, the workers, the migrations."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import click
import msgspec

from kassa import heap
from kassa.api.measure import numbers_server
from kassa.app import App
from kassa.cli.database import database
from kassa.cli.node import api_of, log_to_stderr, stop_signal, warn_of_orders
from kassa.cli.options import broker_option, place_options, run, settings_of
from kassa.cli.output import encoded, json_option, note, show
from kassa.db.migrate import Migration, require_current
from kassa.db.migrate import migrate as bring_up
from kassa.db.pool import connect
from kassa.errors import BrokerUnreachable, QueueMismatch, QueueNotFound
from kassa.observability.log import configure_logging
from kassa.settings import Settings
from kassa.supervisor import Supervisor
from kassa.workers import loops


@click.command()
@place_options
@click.option("--host", help="Address to listen on [default: 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the API [default: 8080]; 0: a free one.")
@click.option("--with-workers", is_flag=True, help="Run the workers in this process too.")
@broker_option
@json_option
def serve(
    directory: str | None,
    database_url: str | None,
    host: str | None,
    port: int | None,
    with_workers: bool,
    brokers: tuple[str, ...],
    as_json: bool,
) -> None:
    """The API, until it is told to stop. The database must be migrated (`kassa migrate`)."""
    settings = settings_of(directory, database_url, host=host, port=port, brokers=brokers or None).settings
    log_to_stderr(settings, "json")
    run(_serve(settings, loops.NAMES if with_workers else (), as_json))


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…", type=click.Choice(loops.NAMES))
@broker_option
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), metavar="PORT",
    help="Numbers for Prometheus at /metrics on this port; 0: a free one.",
)  # fmt: skip
@click.option(
    "--metrics-host", default="127.0.0.1", show_default=True, metavar="HOST", help="Address for --metrics-port."
)
@place_options
@json_option
def worker(
    names: tuple[str, ...],
    brokers: tuple[str, ...],
    metrics_port: int | None,
    metrics_host: str,
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """The workers of these names, or all of them, until they are told to stop. Any number of processes may run them."""
    settings = settings_of(directory, database_url, brokers=brokers or None).settings
    log_to_stderr(settings, "json")
    page = None if metrics_port is None else (metrics_host, metrics_port)
    run(_work(settings, names or loops.NAMES, page, as_json))


@click.command()
@place_options
@json_option
def migrate(directory: str | None, database_url: str | None, as_json: bool) -> None:
    """Applies what the database still lacks. May be repeated, and run by several processes at once."""
    configure_logging(level=logging.WARNING)
    settings = settings_of(directory, database_url).settings

    def tell(migration: Migration) -> None:
        note(f"{migration.number:04} {migration.name} …")

    with database(Path(settings.dir), settings.database_url, note) as found:
        applied = run(bring_up(found.url, progress=tell))
    names = [f"{migration.number:04}_{migration.name}" for migration in applied]

    def people() -> None:
        print(f"{len(names)} migration(s) applied." if names else "The database is up to date.")

    show({"applied": names}, as_json, people)


@asynccontextmanager
async def _app(settings: Settings) -> AsyncIterator[App]:
    async with AsyncExitStack() as stack:
        found = stack.enter_context(database(Path(settings.dir), settings.database_url, note))
        connection = await connect(found.url, application="kassa start")
        try:
            await require_current(connection)
        finally:
            await connection.close()
        app = App(msgspec.structs.replace(settings, database_url=found.url))
        await app.start()
        stack.push_async_callback(app.stop)
        yield app


async def _serve(settings: Settings, workers: tuple[str, ...], as_json: bool) -> None:
    told = stop_signal()
    async with _app(settings) as app, api_of(app, workers) as api:
        heap.settle()
        if as_json:
            print(encoded({"api": api.url}), flush=True)
        else:
            note(f"Kassa's API is ready at {api.url}")
        await told.wait()


@asynccontextmanager
async def _numbers(app: App, supervisor: Supervisor, host: str, port: int) -> AsyncIterator[str]:
    """A process without the API tells its numbers too; the address of its page."""
    server = numbers_server(app, lambda: loops.idle_workers(supervisor), host, port)
    try:
        await server.start()
    except OSError as error:
        raise click.ClickException(
            f"Cannot listen on {host}:{port} ({error.strerror}). Try --metrics-port 0."
        ) from error
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
    finally:
        await server.stop(0.0)


async def _open_brokers(app: App, names: tuple[str, ...]) -> None:
    """Says at once, where somebody looks, that a broker is away or lacks something; later that is waited for. Workers that need
    none do not wait for it: a restart in the middle of an outage must not stop timers and webhooks."""
    try:
        await app.brokers.open()
    except (BrokerUnreachable, QueueNotFound, QueueMismatch) as error:
        if set(names) <= set(loops.BROKER_WORKERS):
            raise
        note(f"! {error.detail}")
        note("The other workers go on; what travels over it waits until it is back.")


async def _work(settings: Settings, names: tuple[str, ...], page: tuple[str, int] | None, as_json: bool) -> None:
    """page: host and port of the numbers."""
    told, numbers = stop_signal(), None
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(_app(settings))
        supervisor = loops.supervisor(app, names)
        if page is not None:
            url = await stack.enter_async_context(_numbers(app, supervisor, *page))
            numbers = f"{url}/metrics"
            note(f"numbers at {numbers}")
        if set(names) & set(loops.BROKER_WORKERS):
            await _open_brokers(app, names)
            await loops.prepare_brokers(app)
            await warn_of_orders(app, names)
        supervisor.start()
        heap.settle()
        show({"working": names, "numbers": numbers}, as_json, lambda: note(f"working: {', '.join(names)}"))
        try:
            await told.wait()
        finally:
            await asyncio.shield(supervisor.stop())
