"""A channel like any other, with the simplest wire there is: JSON that carries the word "signed". Pure."""

from collections.abc import Mapping
from datetime import datetime

import msgspec

from kassa.channels.channel import Nonces
from kassa.channels.model import (
    Abnormal,
    ActionType,
    Charge,
    Closed,
    Evidence,
    Failed,
    NextAction,
    NotFound,
    Notice,
    NoticeKind,
    NotSent,
    Outcome,
    Pending,
    Refund,
    Request,
    Response,
    Steps,
    Succeeded,
    Unknown,
)
from kassa.errors import ChannelMessageInvalid

SIGNED = {"signed": "yes"}
"""Without this header an answer or callback could be anybody's."""


class ChargeBody(msgspec.Struct, frozen=True):
    """What the provider needs to know of a charge."""

    number: str
    amount: int
    currency: str
    expires_at: datetime
    attach: str


class RefundBody(msgspec.Struct, frozen=True):
    """What the provider needs to know of a refund."""

    number: str
    charge_number: str
    amount: int
    currency: str


class Said(msgspec.Struct, frozen=True):
    """What the provider says of a charge or refund, in answers and callbacks."""

    state: str
    number: str = ""
    channel_id: str | None = None
    amount: int | None = None
    currency: str | None = None
    code_url: str | None = None
    attach: str | None = None
    kind: str = ""
    """charge or refund, in callbacks."""
    notice: str = ""
    """The callback's own id."""


class ModelChannel:
    """A merchant's account at the model provider."""

    def charge(self, command: Charge, nonces: Nonces) -> Steps:
        """Pending with a code for the payer, mostly."""
        body = ChargeBody(command.number, command.amount, command.currency, command.expires_at, command.attach or "")
        answer = yield Request("POST", "/charges", {}, msgspec.json.encode(body))
        return _meaning("create", answer)

    def query(self, number: str, nonces: Nonces) -> Steps:
        """What became of it."""
        answer = yield Request("GET", f"/charges/{number}", {})
        return _meaning("query", answer)

    def query_by_channel_id(self, channel_id: str, nonces: Nonces) -> Steps:
        """The same, by the provider's number."""
        answer = yield Request("GET", f"/charges/by-id/{channel_id}", {})
        return _meaning("query", answer)

    def close(self, number: str, nonces: Nonces) -> Steps:
        """Closed when the provider agrees."""
        answer = yield Request("POST", f"/charges/{number}/close", {})
        return _meaning("close", answer)

    def refund(self, command: Refund, nonces: Nonces) -> Steps:
        """Pending when it is accepted."""
        body = RefundBody(command.number, command.charge_number, command.amount, command.currency)
        answer = yield Request("POST", "/refunds", {}, msgspec.json.encode(body))
        return _meaning("refund", answer)

    def query_refund(self, number: str, nonces: Nonces) -> Steps:
        """What became of it."""
        answer = yield Request("GET", f"/refunds/{number}", {})
        return _meaning("refund_query", answer)

    def read_callback(self, headers: Mapping[str, str], body: bytes, *, now: datetime) -> Notice:
        """What the provider tells us. Raises ChannelMessageInvalid."""
        if headers.get("signed") != "yes":
            raise ChannelMessageInvalid("The callback is not signed.")
        said = msgspec.json.decode(body, type=Said)
        outcome = _outcome(said, Evidence("callback", authentic=True))
        return Notice(said.notice, NoticeKind(said.kind), said.number, outcome, attach=said.attach)

    def callback_accepted(self) -> tuple[int, Mapping[str, str], bytes]:
        """Taken."""
        return 200, {}, b""

    def callback_refused(self, reason: str, *, status: int = 500) -> tuple[int, Mapping[str, str], bytes]:
        """Not taken, send it again."""
        return status, {}, reason.encode()


def _meaning(source: str, answer: Response) -> Outcome:
    evidence = Evidence(source, authentic=answer.headers.get("signed") == "yes", status=answer.status)
    if answer.status == 429:
        return NotSent(evidence, "too many")
    if not evidence.authentic or answer.status >= 500:
        return Unknown(evidence, f"http {answer.status}")
    if answer.status == 404:
        return NotFound(evidence)
    return _outcome(msgspec.json.decode(answer.body, type=Said), evidence)


def _outcome(said: Said, evidence: Evidence) -> Outcome:
    match said.state:
        case "waiting":
            action = None if said.code_url is None else NextAction(ActionType.QR_CODE, {"code_url": said.code_url})
            return Pending(evidence, action, said.channel_id)
        case "processing":
            return Pending(evidence, None, said.channel_id)
        case "succeeded":
            return Succeeded(evidence, said.channel_id, said.amount, said.currency)
        case "closed":
            return Closed(evidence)
        case "abnormal":
            return Abnormal(evidence, said.channel_id)
        case "refused" | "failed":
            return Failed(evidence, "REFUSED", "The provider said no.")
        case state:
            return Unknown(evidence, f"a state that is not known: {state}")
