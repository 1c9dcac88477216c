"""`kassa payment show`: the whole story of one payment, in order."""

from typing import Any

import click
import msgspec

from kassa.cli.options import opened, place_options, run
from kassa.cli.output import json_option, money, show
from kassa.errors import PaymentNotFound
from kassa.ids import Id, read_id


@click.group()
def payment() -> None:
    """One payment or top-up."""


@payment.command("show")
@click.argument("name", metavar="ID")
@place_options
@json_option
def show_payment(name: str, directory: str | None, database_url: str | None, as_json: bool) -> None:
    """The whole story of one payment or top-up, in order.

    What was asked of the channel and what it answered, callbacks, moves, postings, events, webhooks, and what is due.
    """
    inner = read_id("pay_", name) or read_id("top_", name)
    if inner is None:
        raise PaymentNotFound(payment=name)
    payment, story = run(_story(directory, database_url, inner))
    shown = msgspec.json.decode(payment)
    document = shown | {"timeline": msgspec.to_builtins(story)}
    show(document, as_json, lambda: _tell(shown, story))


async def _story(directory: str | None, database_url: str | None, payment_id: Id) -> tuple[bytes, list[Any]]:
    async with opened(directory, database_url) as app:
        home = await app.payments_store.home_of_payment(payment_id)
        story = None if home is None else await app.timeline.of(home, payment_id)
        if story is None:
            raise PaymentNotFound(payment=payment_id)
        found = await app.payments_store.payment(home, payment_id)
        answer = await app.payments.get_payment(home, payment_id, kind=found[0].kind)
        return answer.body, story


def _tell(shown: dict[str, Any], story: list[Any]) -> None:
    amount = money(shown["amount"], shown["currency"])
    print(f"{shown['id']}  {shown['state']}  {amount}  order {shown['order_id']}  {shown['channel']}/{shown['method']}")
    if shown["description"]:
        print(f"  {shown['description']}")
    if shown["amount_refunded"] or shown["amount_refunding"]:
        refunded, refunding = shown["amount_refunded"], shown["amount_refunding"]
        print(f"  refunded {money(refunded, shown['currency'])}, on its way {money(refunding, shown['currency'])}")
    print()
    day = None
    for entry in story:
        if entry.at.date() != day:
            day = entry.at.date()
            print(f"{day} (UTC)")
        print(f"  {entry.at:%H:%M:%S.%f}"[:-3] + f"  {entry.kind:<8}  {entry.text}")
