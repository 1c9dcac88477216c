"""The ledger for operators: balances, statements, and proof that nothing in it was changed."""

from typing import Any

import click
import msgspec

from kassa.cli.options import merchant_of, opened, place_options, run
from kassa.cli.output import json_option, money, show, table, when
from kassa.errors import WalletNotFound
from kassa.ids import Id, read_id
from kassa.ledger.chart import NAMES, Code, Posting
from kassa.ledger.model import AccountKey, Kind

OWN = {NAMES[code]: code for code in Code if code is not Code.WALLET}
LINES_MAX = 100_000
"""Printed at once; more is for a program, page by page over the API."""


@click.group()
def ledger() -> None:
    """Balances, statements, and proof."""


@ledger.command()
@click.option(
    "--merchant", "merchant_name", metavar="ID", help="One merchant's accounts; else the trial balance of all."
)
@place_options
@json_option
def balances(merchant_name: str | None, directory: str | None, database_url: str | None, as_json: bool) -> None:
    """The trial balance: every account's purpose and currency, and sums that must be zero."""

    async def work() -> list[dict[str, Any]]:
        async with opened(directory, database_url) as app:
            if merchant_name is None:
                return [_trial_line(line) for line in await app.ledger.trial_balance()]
            found = await merchant_of(app, merchant_name)
            return [_account_line(account) for account in await app.ledger.own_accounts(found.home)]

    lines = run(work())
    sums: dict[str, int] = {}
    for line in lines:
        sums[line["currency"]] = sums.get(line["currency"], 0) + line["balance"]
    is_whole = merchant_name is None
    document = {"accounts": lines} | ({"sums": sums} if is_whole else {})

    def people() -> None:
        table(
            ("account", "currency", "debits", "credits", "balance", "held"),
            [
                (
                    line["account"],
                    line["currency"],
                    *(money(line[name], line["currency"]) for name in ("debits", "credits", "balance", "held")),
                )
                for line in lines
            ],
            right=("debits", "credits", "balance", "held"),
        )
        if is_whole:
            for currency, total in sums.items():
                print(f"Σ {money(total, currency)}" + ("" if total == 0 else "  and it must be zero!"))

    show(document, as_json, people)
    if is_whole and any(sums.values()):
        raise click.ClickException("The books do not balance. Run `kassa ledger verify`.")


@ledger.command()
@click.argument("account", metavar="ACCOUNT")
@click.option("--merchant", "merchant_name", metavar="ID", help="mch_…; not needed if there is one.")
@click.option("--currency", default="CNY", show_default=True)
@click.option("--limit", type=click.IntRange(1, LINES_MAX), default=50, show_default=True)
@place_options
@json_option
def statement(
    account: str,
    merchant_name: str | None,
    currency: str,
    limit: int,
    directory: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """What happened to an account, newest first.

    ACCOUNT: wal_…, or one of merchant_payable, fee_income, channel_receivable, suspense.
    """
    wallet = read_id("wal_", account)
    if wallet is None and account not in OWN:
        raise click.UsageError(f"{account} is neither wal_… nor one of {', '.join(OWN)}.")

    async def work() -> tuple[list[Any], dict[Id, str]]:
        async with opened(directory, database_url) as app:
            found = await merchant_of(app, merchant_name)
            if wallet is None:
                key = AccountKey(found.home, OWN[account], "", currency)
            else:
                opened_wallet = await app.payments_store.wallet(found.home, wallet)
                if opened_wallet is None:
                    raise WalletNotFound(wallet=account)
                key = opened_wallet[1].key
            row = await app.ledger.account(key)
            lines: list[Any] = [] if row is None else await app.ledger.statement(row.id, None, limit)
            return lines, await app.payments_store.names_of(found.home, {line.root for line in lines if line.root})

    lines, names = run(work())
    rows = [
        {
            "version": line.version,
            "at": line.at,
            "kind": Posting(line.code).name.lower()
            + {Kind.HOLD: "_held", Kind.RELEASE: "_released"}.get(line.kind, ""),
            "amount": line.amount,
            "balance": line.balance,
            "held": line.held,
            "root": line.root,
            "resource": names.get(line.root),
        }
        for line in lines
    ]

    def people() -> None:
        table(
            ("no.", "at (UTC)", "kind", "amount", "balance", "held", "for"),
            [
                (
                    row["version"],
                    when(row["at"]),
                    row["kind"],
                    *(money(row[name], currency) for name in ("amount", "balance", "held")),
                    row["resource"] or "",
                )
                for row in rows
            ],
            right=("no.", "amount", "balance", "held"),
        )

    show({"data": rows}, as_json, people)


@ledger.command()
@place_options
@json_option
def verify(directory: str | None, database_url: str | None, as_json: bool) -> None:
    """Proves that what stands in the database is what was committed: all of it, and nothing else."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from kassa.journal import verify as proof
    from kassa.settings import anchor_key
    from kassa.tables import TABLES

    async def work() -> tuple[Any, bool]:
        async with opened(directory, database_url) as app:
            secret = anchor_key(app.settings)
            public = None if secret is None else Ed25519PrivateKey.from_private_bytes(secret).public_key()
            async with app.pool.acquire() as connection:
                return await proof.verify(connection, TABLES, public), secret is not None

    report, has_key = run(work())

    def people() -> None:
        print(f"{report.batches} batches, {report.rows} rows, {report.transfers} transfers, {report.accounts} accounts")
        for fault in report.faults:
            print(f"  FAULT  {fault}")
        if report.fault_count > len(report.faults):
            print(f"  … and {report.fault_count - len(report.faults)} more")
        if report.is_sound and report.anchored_at is not None:
            print(f"Sound, and proven up to the anchor of {when(report.anchored_at)} UTC.")
        elif report.is_sound:
            print(
                "Consistent."
                + (" There is no anchor yet." if has_key else " Without the anchor key, no more is proven.")
            )

    show(msgspec.to_builtins(report) | {"is_sound": report.is_sound}, as_json, people)
    if not report.is_sound:
        raise click.ClickException(f"{report.fault_count} fault(s): the database is not what was committed.")


def _trial_line(line: Any) -> dict[str, Any]:
    return {
        "account": NAMES[Code(line.code)],
        "currency": line.currency,
        "accounts": line.accounts,
        "debits": line.debits_posted,
        "credits": line.credits_posted,
        "balance": line.credits_posted - line.debits_posted,
        "held": line.debits_pending,
    }


def _account_line(account: Any) -> dict[str, Any]:
    return {
        "account": NAMES[Code(account.key.code)],
        "currency": account.key.currency,
        "accounts": 1,
        "debits": account.debits_posted,
        "credits": account.credits_posted,
        "balance": account.credits_posted - account.debits_posted,
        "held": account.debits_pending,
    }
