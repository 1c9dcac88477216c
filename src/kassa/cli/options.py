"""The options that many commands share, and how a command gets at the system that they name."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from kassa.cli.database import database
from kassa.cli.output import note
from kassa.errors import MerchantNotFound
from kassa.ids import Id, read_id
from kassa.observability.log import configure_logging
from kassa.settings import Loaded, load, make_secrets_key

Command = TypeVar("Command", bound=Callable[..., Any])
Result = TypeVar("Result")


def place_options(command: Command) -> Command:
    """--dir and --database-url: which system."""
    command = click.option("--dir", "directory", metavar="DIR", help="Directory of the set-up [default: .kassa].")(
        command
    )
    return click.option("--database-url", metavar="URL", help="postgresql://…; none: the one of DIR.")(command)


def broker_option(command: Command) -> Command:
    """--broker, as often as there are brokers."""
    return click.option(
        "--broker",
        "brokers",
        multiple=True,
        metavar="URL[#TOPIC,…]",
        help="amqp://…, kafka://…, rocketmq://…?namesrv=…, zeromq://…, postgres; may be given several times, each for its topics.",
    )(command)


def run(work: Awaitable[Result]) -> Result:
    """Runs a command's work to its end, on the quick event loop where there is one."""

    async def waited() -> Result:
        return await work

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(waited())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def settings_of(directory: str | None, database_url: str | None, **flags: Any) -> Loaded:
    """The settings of the system that the options name. Raises SettingInvalid."""
    return load({"database_url": database_url, **flags}, directory=directory)


@asynccontextmanager
async def opened(directory: str | None, database_url: str | None) -> AsyncIterator[Any]:
    """The App of a running or stopped system; what had to be started for it is stopped again."""
    from kassa.app import App
    from kassa.db.migrate import require_current
    from kassa.db.pool import connect

    configure_logging(level=logging.WARNING)
    settings = settings_of(directory, database_url).settings
    with database(Path(settings.dir), settings.database_url, note) as found:
        connection = await connect(found.url, application="kassa command")
        try:
            await require_current(connection)
        finally:
            await connection.close()
        if found.running is not None:
            # A set-up on one machine makes its own key; several machines must be given the same one.
            make_secrets_key(settings)
        app = App(msgspec.structs.replace(settings, database_url=found.url))
        await app.start()
        try:
            yield app
        finally:
            await app.stop()


async def merchant_of(app: Any, name: str | None) -> Any:
    """The merchant of --merchant, or the only one there is. Raises MerchantNotFound."""
    if name is not None:
        return await app.merchants.get(merchant_id(name))
    found = await app.merchants.all(limit=2)
    if len(found) != 1:
        raise click.UsageError("There is not exactly one merchant: name it with --merchant mch_….")
    return found[0]


def merchant_id(name: str) -> Id:
    """The id of `mch_…`. Raises MerchantNotFound."""
    inner = read_id("mch_", name)
    if inner is None:
        raise MerchantNotFound(merchant=name)
    return inner
