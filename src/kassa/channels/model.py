"""What Kassa asks of a channel and what a channel can answer. Pure: no IO, no clock, no randomness.

A channel file translates: it yields `Request`s, is sent `Response`s, and returns an `Outcome`. `runner.py` alone sends.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, complete to the byte. `body` is what was signed; it is sent as it stands."""

    method: str
    path: str
    """Path with query, as it was signed; the runner puts the account's base URL before it."""
    headers: Mapping[str, str]
    body: bytes = b""
    timeout_s: float = 8.0


@dataclass(frozen=True, slots=True)
class Response:
    """What came back. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why we believe an outcome. Goes into the timeline, so it holds no secret and no personal data."""

    source: str
    """create, query, close, refund, refund_query, callback, bill or transport."""
    authentic: bool
    """Signed by the provider and checked."""
    status: int | None = None
    code: str | None = None
    text: str | None = None


class ActionType(Enum):
    """What the payer needs to go on."""

    QR_CODE = "qr_code"
    REDIRECT = "redirect"
    JSAPI = "jsapi"
    APP = "app"


@dataclass(frozen=True, slots=True)
class NextAction:
    """QR_CODE carries {code_url}; REDIRECT {url}; JSAPI and APP {params: {...}}."""

    type: ActionType
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The money moved: positive, authenticated evidence. Amounts are minor units, as the channel says them."""

    evidence: Evidence
    channel_id: str | None
    amount: int | None = None
    currency: str | None = None
    at: datetime | None = None
    payer: str | None = None
    """The payer's name at the channel (openid)."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Accepted by the channel, not final. For a charge the payer must act; `next_action` says how (None: as before)."""

    evidence: Evidence
    next_action: NextAction | None = None
    channel_id: str | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """The channel says that this order is closed and was not paid (or, for a refund, that it was closed unpaid)."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class NotFound:
    """A signed answer says that the channel does not know the number *now*. Evidence of nothing before its time."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Abnormal:
    """A refund that the channel cannot credit to the payer; a person must act. The reservation stays."""

    evidence: Evidence
    channel_id: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Definite: the operation did not and will not happen under this number. `code` and `reason` are for people."""

    evidence: Evidence
    code: str
    reason: str


class Advice(Enum):
    """What leads out of a doubt."""

    QUERY = "query"
    """Ask what became of it; when that is still open, send the identical bytes again. Never another number."""
    REFRESH_KEYS = "refresh_keys"
    """The provider signed with a key that we do not have: fetch its keys (at a bounded rate), then query."""
    OPERATOR = "operator"
    """The provider refuses our credentials or rights: a person must act; go on asking slowly until then."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Perhaps it happened. Only a query, a callback or a bill can tell."""

    evidence: Evidence
    reason: str
    advice: Advice = Advice.QUERY


@dataclass(frozen=True, slots=True)
class NotSent:
    """Proven that nothing of *this sending* was taken in (connection refused, 429): the same number may go again after
    a pause. It says nothing about an earlier sending whose answer was lost."""

    evidence: Evidence
    reason: str


Outcome = Succeeded | Pending | Closed | NotFound | Abnormal | Failed | Unknown | NotSent

Steps = Generator[Request, Response, Outcome]
"""A conversation: yields requests, is sent responses, returns what they mean. The runner drives it."""


class Method(Enum):
    """How the payer meets the channel."""

    NATIVE = "native"
    JSAPI = "jsapi"
    H5 = "h5"
    APP = "app"


@dataclass(frozen=True, slots=True)
class Charge:
    """Ask for money. `number` is the attempt's name at the channel: [0-9A-Za-z]{20,32}, fixed before the first byte."""

    number: str
    amount: int
    currency: str
    method: Method
    description: str
    expires_at: datetime
    notify_url: str
    openid: str | None = None
    payer_ip: str | None = None
    attach: str | None = None
    return_url: str | None = None
    repeat: bool = False
    """An earlier sending of these bytes has no known outcome: no refusal of this one says anything about that one."""


@dataclass(frozen=True, slots=True)
class Refund:
    """Give money back. `number` names the refund at the channel, `charge_number` the attempt that was paid."""

    number: str
    charge_number: str
    amount: int
    charge_amount: int
    currency: str
    notify_url: str
    reason: str | None = None
    repeat: bool = False
    """As with a charge."""


class NoticeKind(Enum):
    """What a callback speaks of."""

    CHARGE = "charge"
    REFUND = "refund"


@dataclass(frozen=True, slots=True)
class Notice:
    """What a verified callback says. `number` is ours, `outcome` what it means, `id` the provider's id for repeats."""

    id: str
    kind: NoticeKind
    number: str
    outcome: Outcome
    charge_number: str | None = None
    attach: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Nonce:
    """Time and randomness for one signed request, passed in so that a test can freeze them."""

    now: datetime
    token: str
    """Random, [0-9A-Za-z]{16,32}."""
