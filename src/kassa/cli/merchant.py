"""Setting up: merchants and their policies, their accounts at channels, their API keys."""

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from kassa.cli.options import merchant_id, merchant_of, opened, place_options, run
from kassa.cli.output import json_option, show, table, when
from kassa.errors import ApiKeyNotFound, SettingInvalid
from kassa.ids import read_id

merchant_option = click.option("--merchant", "merchant_name", metavar="ID", help="mch_…; not needed if there is one.")


@click.group()
def merchant() -> None:
    """Merchants and their policies."""


@merchant.command("create")
@click.argument("name")
@click.argument("policies", nargs=-1, metavar="[NAME=VALUE]…")
@place_options
@json_option
def create_merchant(
    name: str, policies: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool
) -> None:
    """A new merchant. Policies as in `kassa merchant set`."""

    async def work() -> Any:
        async with opened(directory, database_url) as app:
            return await app.merchants.create(name, **_pairs(policies))

    _show_merchant(run(work()), as_json)


@merchant.command("set")
@click.argument("name", metavar="ID")
@click.argument("policies", nargs=-1, required=True, metavar="NAME=VALUE…")
@place_options
@json_option
def set_merchant(
    name: str, policies: tuple[str, ...], directory: str | None, database_url: str | None, as_json: bool
) -> None:
    """Sets policies: fee_ppm=6000 fee_on_refund=returned|kept late_success=refund|accept|hold overdraft=0 name=…

    Payments that exist keep the policies that they were made with.
    """

    async def work() -> Any:
        async with opened(directory, database_url) as app:
            return await app.merchants.set_policies(merchant_id(name), _pairs(policies))

    _show_merchant(run(work()), as_json)


@merchant.command("show")
@click.argument("name", required=False, metavar="[ID]")
@place_options
@json_option
def show_merchant(name: str | None, directory: str | None, database_url: str | None, as_json: bool) -> None:
    """One merchant, with its channels and keys."""

    async def work() -> tuple[Any, Any, Any]:
        async with opened(directory, database_url) as app:
            found = await merchant_of(app, name)
            return found, await app.merchants.channels(found.id), await app.merchants.keys(found.id)

    found, channels, keys = run(work())
    document = _merchant(found) | {
        "channels": [_channel(account) for account in channels],
        "keys": [_key(row) for row in keys],
    }

    def people() -> None:
        _table_of_merchant(found)
        table(
            ("channel", "state", "set"),
            [(account.channel, account.state, when(account.updated_at)) for account in channels],
        )
        _table_of_keys(keys)

    show(document, as_json, people)


@merchant.command("list")
@place_options
@json_option
def list_merchants(directory: str | None, database_url: str | None, as_json: bool) -> None:
    """All merchants, oldest first."""

    async def work() -> list[Any]:
        async with opened(directory, database_url) as app:
            found: list[Any] = []
            while page := await app.merchants.all(found[-1].id if found else None):
                found += page
            return found

    found = run(work())
    heads = ("id", "name", "fee_ppm", "fee_on_refund", "late_success", "overdraft", "created_at")
    rows = [_merchant(one) for one in found]

    def people() -> None:
        shown = [row | {"created_at": when(row["created_at"])} for row in rows]
        table(heads, [[row[head] for head in heads] for row in shown], right=("fee_ppm", "overdraft"))

    show({"data": rows}, as_json, people)


@click.group()
def channel() -> None:
    """A merchant's accounts at channels."""


@channel.command("set")
@click.argument("name", metavar="CHANNEL")
@click.argument("credentials", nargs=-1, metavar="[NAME=VALUE|NAME=@FILE]…")
@merchant_option
@click.option(
    "--from",
    "source",
    metavar="FILE",
    help="A JSON object of credentials, as `kassa sandbox` prints it; - reads stdin.",
)
@place_options
@json_option
def set_channel(
    name: str,
    credentials: tuple[str, ...],
    merchant_name: str | None,
    source: str | None,
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Keeps a merchant's credentials at a channel, encrypted. They replace those that were there.

    For wechat: mchid, appid, merchant_serial_no, merchant_private_key_pem, apiv3_key, and platform_public_key_id with
    platform_public_key_pem, or platform_certificate_pem. Give secrets as NAME=@FILE: what stands on a command line can
    be seen by others.
    """
    from kassa.channels.registry import open_channel

    given = _read_object(source) | {key: _from_file(value) for key, value in _pairs(credentials).items()}
    open_channel(name, given)

    async def work() -> tuple[Any, Any]:
        async with opened(directory, database_url) as app:
            found = await merchant_of(app, merchant_name)
            return found, await app.merchants.set_channel(found.id, name, given)

    found, account = run(work())

    def people() -> None:
        print(f"mch_{found.id} can take payments over {account.channel}.")

    show(_channel(account) | {"merchant": f"mch_{found.id}"}, as_json, people)


@click.group()
def key() -> None:
    """A merchant's API keys."""


@key.command("create")
@merchant_option
@click.option("--operator", is_flag=True, help="A key of the house: for /v1/queues, and for nothing else.")
@click.option("--label", default="", help="So that people can tell keys apart.")
@click.option(
    "--scopes",
    default="all",
    help="Space-separated: all, or read, payments, refunds, wallets, webhooks.",
    show_default=True,
)
@place_options
@json_option
def create_key(
    merchant_name: str | None,
    operator: bool,
    label: str,
    scopes: str,
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """A new API key, shown now and never again."""
    if operator and (merchant_name is not None or scopes != "all"):
        raise click.UsageError("A key of the house belongs to no --merchant, and its scope is `operator`.")

    async def work() -> Any:
        async with opened(directory, database_url) as app:
            if operator:
                return await app.merchants.create_operator_key(label=label)
            found = await merchant_of(app, merchant_name)
            return await app.merchants.create_key(found.id, label=label, scopes=scopes)

    made = run(work())

    def people() -> None:
        print(made.key)

    show(_key(made.row) | {"key": made.key}, as_json, people)


@key.command("list")
@merchant_option
@click.option("--operator", is_flag=True, help="The keys of the house.")
@place_options
@json_option
def list_keys(
    merchant_name: str | None, operator: bool, directory: str | None, database_url: str | None, as_json: bool
) -> None:
    """A merchant's keys, oldest first; of each only its first characters are known."""

    async def work() -> list[Any]:
        async with opened(directory, database_url) as app:
            found: list[Any]
            if operator:
                found = await app.merchants.operator_keys()
                return found
            found = await app.merchants.keys((await merchant_of(app, merchant_name)).id)
            return found

    found = run(work())
    show({"data": [_key(row) for row in found]}, as_json, lambda: _table_of_keys(found))


@key.command("revoke")
@click.argument("name", metavar="ID")
@place_options
@json_option
def revoke_key(name: str, directory: str | None, database_url: str | None, as_json: bool) -> None:
    """The key is refused from now on, by every process within two seconds."""
    inner = read_id("key_", name)
    if inner is None:
        raise ApiKeyNotFound(key=name)

    async def work() -> Any:
        async with opened(directory, database_url) as app:
            return await app.merchants.revoke_key(inner)

    row = run(work())
    show(_key(row), as_json, lambda: print(f"{name} is revoked."))


def _pairs(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE arguments."""
    pairs = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign:
            raise click.UsageError(f"{one!r} should look like NAME=VALUE.")
        pairs[name] = value
    return pairs


def _from_file(value: str) -> str:
    return Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value


def _read_object(source: str | None) -> dict[str, Any]:
    if source is None:
        return {}
    text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise SettingInvalid(f"The credentials are not a JSON object: {error}.", source=source) from None


def _merchant(found: Any) -> dict[str, Any]:
    return {
        "id": f"mch_{found.id}",
        "name": found.name,
        "state": found.state,
        "fee_ppm": found.fee_ppm,
        "fee_on_refund": found.fee_on_refund,
        "late_success": found.late_success,
        "overdraft": found.overdraft,
        "created_at": found.created_at,
    }


def _table_of_merchant(found: Any) -> None:
    table(("", ""), (_merchant(found) | {"created_at": when(found.created_at)}).items())


def _show_merchant(found: Any, as_json: bool) -> None:
    show(_merchant(found), as_json, lambda: _table_of_merchant(found))


def _channel(account: Any) -> dict[str, Any]:
    """Without credentials: nobody needs to see them again."""
    return {"channel": account.channel, "state": account.state, "updated_at": account.updated_at}


def _key(row: Any) -> dict[str, Any]:
    return {
        "id": f"key_{row.id}",
        "shown": row.shown,
        "label": row.label,
        "scopes": row.scopes,
        "state": row.state,
        "created_at": row.created_at,
        "revoked_at": row.revoked_at,
    }


def _table_of_keys(rows: list[Any]) -> None:
    table(
        ("key", "begins", "label", "scopes", "state", "created"),
        [(f"key_{row.id}", f"{row.shown}…", row.label, row.scopes, row.state, when(row.created_at)) for row in rows],
    )
