"""Whose payments the requests of the queue payment_order are. They have no API key, so a setting says it."""

from kassa.errors import SettingInvalid
from kassa.ids import read_id
from kassa.merchants.records import Merchant
from kassa.merchants.store import MerchantStore

SETTING = "order_merchant"
MEND = (
    "Set KASSA_ORDER_MERCHANT to the id of an active merchant (`kassa merchant list`), or let no broker carry payment_order. "
    "What comes over it waits until then."
)


async def merchant_of_orders(merchants: MerchantStore, name: str | None) -> Merchant:
    """The active merchant that `order_merchant` names; None: the only one. Raises SettingInvalid."""
    merchant = await (_only(merchants) if name is None else _named(merchants, name))
    if merchant.state != "active":
        raise SettingInvalid(
            f"The merchant of the queue payment_order, mch_{merchant.id}, is {merchant.state}.", name=SETTING
        )
    return merchant


async def _named(merchants: MerchantStore, name: str) -> Merchant:
    inner = read_id("mch_", name)
    if inner is None:
        raise SettingInvalid(f"{SETTING} is not a merchant's id: {name}.", name=SETTING)
    merchant = await merchants.merchant(inner)
    if merchant is None:
        raise SettingInvalid(f"{SETTING} names {name}, which does not exist.", name=SETTING)
    return merchant


async def _only(merchants: MerchantStore) -> Merchant:
    found = await merchants.merchants(None, 2)
    if len(found) != 1:
        count = "more than one merchant" if found else "no merchant"
        raise SettingInvalid(
            f"There is {count}, and {SETTING} does not say whose payments the queue payment_order makes.", name=SETTING
        )
    return found[0]
