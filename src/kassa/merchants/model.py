"""What may be decided about merchants, their API keys and channel accounts. Rows in, a Change or a refusal out."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import IntFlag
from typing import Any

import msgspec

from kassa.errors import ApiKeyNotFound, KassaError, RequestInvalid
from kassa.ids import Id
from kassa.journal.change import SYSTEM_HOME, AccountOpen, Aggregate, Change, Claim, Move
from kassa.ledger import chart
from kassa.ledger.model import Limit
from kassa.merchants.records import ApiKey, ChannelAccount, Merchant

KEY_PREFIX = "sk_"
KEY_LENGTH = 32
"""Characters after the prefix: 32 of 62 are 190 bits."""
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

OVERDRAFT_MAX = 9_007_199_254_740_991
POLICIES: dict[str, Any] = {
    "name": str,
    "fee_ppm": int,
    "fee_on_refund": ("returned", "kept"),
    "late_success": ("refund", "accept", "hold"),
    "overdraft": int,
}
"""What `kassa merchant set` takes, and of which kind each is."""


class Scope(IntFlag):
    """What an API key may do. A call that only reads is allowed to `read` and to its own noun's scope."""

    READ = 1
    PAYMENTS = 2
    REFUNDS = 4
    WALLETS = 8
    WEBHOOKS = 16
    OPERATOR = 32
    """Of the house, never of a merchant: it sees the queues, and in them records of all merchants."""


ALL_SCOPES = Scope.READ | Scope.PAYMENTS | Scope.REFUNDS | Scope.WALLETS | Scope.WEBHOOKS


HOUSE = Id("00000000000070008000000000000001")
"""The house itself, in its own home: whose operators have keys. It takes no payments, and no list of merchants has it."""


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Who asks: a merchant, or the house, by one of its keys."""

    merchant: Merchant
    key_id: Id
    scopes: int


def new_key() -> str:
    """A fresh API key: `sk_` and 32 random characters. Shown once; only its hash is kept."""
    return KEY_PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(KEY_LENGTH))


def hash_key(key: str) -> bytes:
    """SHA-256. The key has 190 random bits, so nothing slower or salted is needed."""
    return hashlib.sha256(key.encode()).digest()


def read_scopes(text: str) -> int:
    """The scopes of a space-separated list, as bits. Raises RequestInvalid for a scope that does not exist."""
    bits = 0
    for word in text.split():
        if word == "all":
            bits |= ALL_SCOPES
        elif word.upper() in Scope.__members__ and word.islower():
            bits |= Scope[word.upper()]
        else:
            raise RequestInvalid(
                f"There is no scope {word!r}.", errors=[{"field": "scopes", "message": "unknown scope"}]
            )
    if not bits:
        raise RequestInvalid("A key needs at least one scope.", errors=[{"field": "scopes", "message": "is empty"}])
    return int(bits)


def read_merchant_scopes(text: str) -> int:
    """The scopes of a merchant's key. Raises RequestInvalid, also for what only the house may do."""
    bits = read_scopes(text)
    if bits & Scope.OPERATOR:
        raise RequestInvalid(
            "The scope `operator` sees records of all merchants, so no merchant's key has it: `kassa key create --operator` "
            "makes one for the house.",
            errors=[{"field": "scopes", "message": "operator is not for a merchant"}],
        )
    return bits


def read_policies(given: Mapping[str, Any]) -> dict[str, Any]:
    """Policies as given by a person (text or typed), checked. Raises RequestInvalid, which names each that is wrong."""
    errors: list[dict[str, str]] = []
    policies: dict[str, Any] = {}
    for name, value in given.items():
        checked = _read_policy(name, value)
        if isinstance(checked, _Fault):
            errors.append({"field": name, "message": checked.message})
        else:
            policies[name] = checked
    if errors:
        raise RequestInvalid("; ".join(f"{fault['field']}: {fault['message']}" for fault in errors), errors=errors)
    return policies


class _Fault(msgspec.Struct, frozen=True):
    message: str


def _read_policy(name: str, value: Any) -> Any:
    kind = POLICIES.get(name)
    if kind is None:
        return _Fault("is not a policy; these are: " + ", ".join(POLICIES))
    if isinstance(kind, tuple):
        return value if value in kind else _Fault("must be one of " + ", ".join(kind))
    if kind is str:
        text = str(value).strip()
        return text if 0 < len(text) <= 200 else _Fault("must have 1 to 200 characters")
    if isinstance(value, bool) or not isinstance(value, int | str):
        return _Fault("must be a whole number")
    try:
        number = int(value)
    except ValueError:
        return _Fault("must be a whole number")
    highest = 1_000_000 if name == "fee_ppm" else OVERDRAFT_MAX
    return number if 0 <= number <= highest else _Fault(f"must be from 0 to {highest}")


def create(home: int, merchant_id: Id, name: str, policies: Mapping[str, Any], now: datetime) -> Change:
    """A new merchant in a home of its own."""
    merchant = Merchant(
        home=home, id=merchant_id, version=0, sequence=0, state="active", created_at=now, name=name, **policies
    )
    return Change(home=home, new=(merchant,), root=merchant_id, result=merchant)


def create_house(now: datetime) -> Change:
    """The house, once: a second one finds the name taken."""
    house = Merchant(
        home=SYSTEM_HOME, id=HOUSE, version=0, sequence=0, state="active", created_at=now, name="The house"
    )
    claim = Claim("house", "operators", HOUSE)
    return Change(home=SYSTEM_HOME, claims=(claim,), new=(house,), root=HOUSE, result=house)


def set_policies(aggregate: Aggregate, policies: Mapping[str, Any], currencies: Sequence[str]) -> Change:
    """Other policies from now on. `currencies`: those in which the merchant has a balance, whose limits follow."""
    before = _merchant(aggregate)
    after = msgspec.structs.replace(before, **policies)
    if after == before:
        return Change(home=before.home, result=before)
    opens: tuple[AccountOpen, ...] = ()
    if after.overdraft != before.overdraft:
        opens = tuple(
            AccountOpen(chart.payable(before.home, currency), Limit.DEBITS_WITHIN_CREDITS, after.overdraft)
            for currency in currencies
        )
    return Change(
        home=before.home, moves=(Move(before, after, "policies_set"),), opens=opens, root=before.id, result=after
    )


def add_key(aggregate: Aggregate, key_id: Id, key: str, label: str, scopes: str, now: datetime) -> Change:
    """One more API key."""
    merchant = _merchant(aggregate)
    row = ApiKey(
        home=merchant.home, id=key_id, version=0, root=merchant.id, state="active",
        key_hash=hash_key(key), label=label, scopes=scopes, shown=key[:7], created_at=now,
    )  # fmt: skip
    return Change(home=merchant.home, new=(row,), root=merchant.id, result=row)


def revoke_key(aggregate: Aggregate, key_id: Id, now: datetime) -> Change | KassaError:
    """The key is refused from now on. Revoking it again changes nothing."""
    for row in aggregate.children:
        if isinstance(row, ApiKey) and row.id == key_id:
            if row.state == "revoked":
                return Change(home=row.home, result=row)
            after = msgspec.structs.replace(row, state="revoked", revoked_at=now)
            return Change(home=row.home, moves=(Move(row, after, "revoked"),), root=row.root, result=after)
    return ApiKeyNotFound(key=f"key_{key_id}")


def set_channel(aggregate: Aggregate, account_id: Id, channel: str, sealed: bytes, now: datetime) -> Change:
    """The merchant's credentials at a channel, sealed; they replace what was there."""
    merchant = _merchant(aggregate)
    for row in aggregate.children:
        if isinstance(row, ChannelAccount) and row.channel == channel:
            after = msgspec.structs.replace(row, state="active", credentials=sealed, updated_at=now)
            return Change(home=row.home, moves=(Move(row, after, "credentials_set"),), root=row.root, result=after)
    account = ChannelAccount(
        home=merchant.home, id=account_id, version=0, root=merchant.id, state="active",
        channel=channel, created_at=now, credentials=sealed, updated_at=now,
    )  # fmt: skip
    return Change(home=merchant.home, new=(account,), root=merchant.id, result=account)


def _merchant(aggregate: Aggregate) -> Merchant:
    if not isinstance(aggregate.root, Merchant):
        raise TypeError(f"a merchant is needed here, not {type(aggregate.root).__name__}")
    return aggregate.root
