"""The client of Kassa's API. The twin without `await` is generated from asynchronous.py; change that one.

    async with AsyncKassa("sk_…", "http://127.0.0.1:8080") as kassa:
        payment = await kassa.payments.create(order_id="123456", amount=100, currency="CNY", channel="wechat")

Each call that changes something has an idempotency key, made before the first byte leaves, and repeats itself with it
when the answer is lost; so it happens once. What is refused is raised as the error of `kassa.errors` with the same code.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from kassa.client import problems
from kassa.client.objects import (
    Balance,
    Delivery,
    Entry,
    Event,
    Line,
    Page,
    Payment,
    Refund,
    Replay,
    Topup,
    Wallet,
    WebhookEndpoint,
)
from kassa.errors import KassaError, OutcomeUnknown, PaymentNotFound, ServerUnreachable

Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 40.0
"""The server waits up to 30 seconds for a final state when it is asked to, and up to 8 for a channel's first answer."""

# Nothing has left us when these are raised, so the request did not happen.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class AsyncKassa:
    """Kassa's API with one merchant's key. Safe to share; close it when done, or use it with `async with`."""

    def __init__(
        self,
        api_key: str,
        base_url: str = "http://127.0.0.1:8080",
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        tries_max: int = problems.TRIES_MAX,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        """http: an own client with proxies or certificates; it stays the caller's to close."""
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}", "Accept": "application/json"}
        self._timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        self._tries_max = tries_max
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient()
        self.payments = AsyncPayments(self)
        self.refunds = AsyncRefunds(self)
        self.topups = AsyncTopups(self)
        self.wallets = AsyncWallets(self)
        self.events = AsyncEvents(self)
        self.webhook_endpoints = AsyncWebhookEndpoints(self)
        self.balances = AsyncBalances(self)

    async def aclose(self) -> None:
        """Closes the connections that this client opened."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> "AsyncKassa":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def get(self, path: str, answer: type[Answer], query: Mapping[str, Any] | None = None) -> Answer:
        """Reads something. For calls that this client has no method for. Raises KassaError."""
        return _decode(await self._send("GET", path, query=query), answer)

    async def post(
        self,
        path: str,
        answer: type[Answer],
        body: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        prefer: str | None = None,
    ) -> Answer:
        """Changes something, once. For calls that this client has no method for. Raises KassaError."""
        # The key is fixed here, before the first byte, and every repeat carries it.
        key = key or str(uuid.uuid4())
        headers = {"Idempotency-Key": key} | ({"Prefer": prefer} if prefer else {})
        return _decode(await self._send("POST", path, body=body or {}, headers=headers, key=key), answer, key)

    async def patch(self, path: str, answer: type[Answer], body: Mapping[str, Any]) -> Answer:
        """Sets fields of something; to repeat it changes nothing. Raises KassaError."""
        return _decode(await self._send("PATCH", path, body=body), answer)

    async def delete(self, path: str) -> None:
        """Removes something. Raises KassaError."""
        await self._send("DELETE", path)

    async def each(self, path: str, item: type[Answer], query: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """All of a list, newest first; the next page is asked for when it is needed. Raises KassaError."""
        cursor = None
        while True:
            page = await self.get(path, Page[item], {**query, "cursor": cursor})  # type: ignore[valid-type]
            for one in page.data:
                yield one
            cursor = page.next_cursor
            if cursor is None:
                return

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> bytes:
        """The body of the first good answer. Raises the error of the last try."""
        content = None if body is None else msgspec.json.encode(body)
        sent_headers = self._headers | dict(headers or {})
        if content is not None:
            sent_headers["Content-Type"] = "application/json"
        tries, in_doubt = 0, False
        while True:
            tries += 1
            retry_after = None
            try:
                response = await self._http.request(
                    method,
                    self._base_url + path,
                    params=_plain(query),
                    content=content,
                    headers=sent_headers,
                    timeout=self._timeout,
                    follow_redirects=False,
                )
            except _NOT_SENT as error:
                failure = self._lost(error, None)
            except httpx.TransportError as error:
                in_doubt = True
                failure = self._lost(error, key)
            else:
                if response.is_success:
                    return response.content
                problem = problems.read_problem(response.content)
                more = {} if key is None else {"idempotency_key": key}
                failure = problems.error_of(response.status_code, problem, **more)
                if not problems.may_repeat(response.status_code, problem):
                    raise failure
                in_doubt = in_doubt or problem.get("outcome", "unknown") == "unknown"
                retry_after = response.headers.get("retry-after")
            if tries >= self._tries_max:
                # A server that is busy at the end does not speak of the earlier try whose answer was lost.
                raise _in_doubt(failure, key) if in_doubt and key is not None else failure
            await asyncio.sleep(problems.pause_s(tries, retry_after, random.random()))

    def _lost(self, error: httpx.TransportError, key: str | None) -> KassaError:
        """What to raise when no answer came. key: that of a request of which a byte may have arrived."""
        reason = type(error).__name__
        if key is None:
            return ServerUnreachable(server=self._base_url, reason=reason)
        return OutcomeUnknown(server=self._base_url, reason=reason, idempotency_key=key, outcome="unknown")


class AsyncPayments:
    """Payments: orders to be paid."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    async def create(
        self,
        *,
        order_id: str,
        amount: int,
        currency: str,
        channel: str,
        method: str | None = None,
        description: str | None = None,
        expires_in_s: int | None = None,
        return_url: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wallet: str | None = None,
        openid: str | None = None,
        payer_ip: str | None = None,
        prefer: str | None = None,
        idempotency_key: str | None = None,
    ) -> Payment:
        """Asks for money. amount: minor units. wallet, openid, payer_ip: who pays, as the channel needs it.

        prefer: `wait=N` waits N seconds for the final state, `respond-async` for nothing.
        Raises PaymentOrderExists, WalletInsufficientFunds, RequestInvalid and the rest of `kassa.errors`.
        """
        body = _given(
            order_id=order_id,
            amount=amount,
            currency=currency,
            channel=channel,
            method=method,
            description=description,
            expires_in_s=expires_in_s,
            return_url=return_url,
            metadata=metadata,
            payer=_given(wallet=wallet, openid=openid, ip=payer_ip) or None,
        )
        return await self._kassa.post("/v1/payments", Payment, body, key=idempotency_key, prefer=prefer)

    async def get(self, payment: str) -> Payment:
        """A payment as it stands now. Raises PaymentNotFound."""
        return await self._kassa.get(f"/v1/payments/{_part(payment)}", Payment)

    async def find(self, order_id: str) -> Payment:
        """The payment of an order. Raises PaymentNotFound."""
        page = await self._kassa.get("/v1/payments", Page[Payment], {"order_id": order_id})
        if not page.data:
            raise PaymentNotFound(order_id=order_id)
        return page.data[0]

    def list(
        self,
        *,
        state: str | None = None,
        created_from: datetime | None = None,
        created_to: datetime | None = None,
        limit: int = 100,
    ) -> AsyncIterator[Payment]:
        """All payments, newest first. limit: how many are fetched at a time."""
        query = {"state": state, "created_from": created_from, "created_to": created_to, "limit": limit}
        return self._kassa.each("/v1/payments", Payment, query)

    async def close(self, payment: str, *, prefer: str | None = None, idempotency_key: str | None = None) -> Payment:
        """Wants no more money for it. Raises PaymentNotClosable when it is paid."""
        path = f"/v1/payments/{_part(payment)}/close"
        return await self._kassa.post(path, Payment, key=idempotency_key, prefer=prefer)

    async def add_attempt(
        self,
        payment: str,
        *,
        channel: str,
        method: str,
        openid: str | None = None,
        payer_ip: str | None = None,
        prefer: str | None = None,
        idempotency_key: str | None = None,
    ) -> Payment:
        """Lets the payer pay the same order another way. Raises AttemptInDoubt, PaymentNotPayable."""
        payer = _given(openid=openid, ip=payer_ip) or None
        body = _given(channel=channel, method=method, payer=payer)
        path = f"/v1/payments/{_part(payment)}/attempts"
        return await self._kassa.post(path, Payment, body, key=idempotency_key, prefer=prefer)

    async def resolve(self, payment: str, *, decision: str, reason: str, idempotency_key: str | None = None) -> Payment:
        """Decides about money that came late and is held. decision: accept or refund. Raises PaymentNotHeld."""
        path = f"/v1/payments/{_part(payment)}/resolve"
        return await self._kassa.post(path, Payment, {"decision": decision, "reason": reason}, key=idempotency_key)

    async def timeline(self, payment: str) -> tuple[Entry, ...]:
        """Everything that happened to a payment, in order. Raises PaymentNotFound."""
        return (await self._kassa.get(f"/v1/payments/{_part(payment)}/timeline", Page[Entry])).data


class AsyncRefunds:
    """Refunds: money given back."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    async def create(
        self,
        payment: str,
        *,
        amount: int,
        refund_id: str,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        prefer: str | None = None,
        idempotency_key: str | None = None,
    ) -> Refund:
        """Gives back part or all of a payment or top-up. refund_id: the merchant's own number for it, used once.

        Raises RefundExceedsPaid, RefundNotRefundable, RefundIdExists, RefundInsufficientBalance.
        """
        body = _given(amount=amount, refund_id=refund_id, reason=reason, metadata=metadata)
        noun = "topups" if payment.startswith("top_") else "payments"
        path = f"/v1/{noun}/{_part(payment)}/refunds"
        return await self._kassa.post(path, Refund, body, key=idempotency_key, prefer=prefer)

    async def get(self, refund: str) -> Refund:
        """A refund as it stands now. Raises RefundNotFound."""
        return await self._kassa.get(f"/v1/refunds/{_part(refund)}", Refund)

    def list(
        self,
        *,
        state: str | None = None,
        created_from: datetime | None = None,
        created_to: datetime | None = None,
        limit: int = 100,
    ) -> AsyncIterator[Refund]:
        """All refunds, newest first. limit: how many are fetched at a time."""
        query = {"state": state, "created_from": created_from, "created_to": created_to, "limit": limit}
        return self._kassa.each("/v1/refunds", Refund, query)


class AsyncTopups:
    """Top-ups: payments whose success credits a wallet."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    async def create(
        self,
        *,
        order_id: str,
        wallet: str,
        amount: int,
        currency: str,
        channel: str,
        method: str | None = None,
        description: str | None = None,
        expires_in_s: int | None = None,
        return_url: str | None = None,
        metadata: Mapping[str, str] | None = None,
        openid: str | None = None,
        payer_ip: str | None = None,
        prefer: str | None = None,
        idempotency_key: str | None = None,
    ) -> Topup:
        """Asks for money for a wallet. Raises WalletNotFound, PaymentOrderExists, RequestInvalid and the rest."""
        body = _given(
            order_id=order_id,
            wallet=wallet,
            amount=amount,
            currency=currency,
            channel=channel,
            method=method,
            description=description,
            expires_in_s=expires_in_s,
            return_url=return_url,
            metadata=metadata,
            payer=_given(openid=openid, ip=payer_ip) or None,
        )
        return await self._kassa.post("/v1/topups", Topup, body, key=idempotency_key, prefer=prefer)

    async def get(self, topup: str) -> Topup:
        """A top-up as it stands now. Raises TopupNotFound."""
        return await self._kassa.get(f"/v1/topups/{_part(topup)}", Topup)

    def list(
        self,
        *,
        state: str | None = None,
        created_from: datetime | None = None,
        created_to: datetime | None = None,
        limit: int = 100,
    ) -> AsyncIterator[Topup]:
        """All top-ups, newest first. limit: how many are fetched at a time."""
        query = {"state": state, "created_from": created_from, "created_to": created_to, "limit": limit}
        return self._kassa.each("/v1/topups", Topup, query)

    async def close(self, topup: str, *, prefer: str | None = None, idempotency_key: str | None = None) -> Topup:
        """Wants no more money for it. Raises PaymentNotClosable when it is paid."""
        path = f"/v1/topups/{_part(topup)}/close"
        return await self._kassa.post(path, Topup, key=idempotency_key, prefer=prefer)

    async def timeline(self, topup: str) -> tuple[Entry, ...]:
        """Everything that happened to a top-up, in order. Raises TopupNotFound."""
        return (await self._kassa.get(f"/v1/topups/{_part(topup)}/timeline", Page[Entry])).data


class AsyncWallets:
    """Wallets: what the merchant's users have with it."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    async def create(self, *, user: str, currency: str, idempotency_key: str | None = None) -> Wallet:
        """Opens a wallet; a user has one per currency. Raises WalletExists."""
        body = {"user": user, "currency": currency}
        return await self._kassa.post("/v1/wallets", Wallet, body, key=idempotency_key)

    async def get(self, wallet: str) -> Wallet:
        """A wallet with its money. Raises WalletNotFound."""
        return await self._kassa.get(f"/v1/wallets/{_part(wallet)}", Wallet)

    def statement(self, wallet: str, *, limit: int = 100) -> AsyncIterator[Line]:
        """What happened to the wallet, newest first, without gaps. limit: how many are fetched at a time."""
        return self._kassa.each(f"/v1/wallets/{_part(wallet)}/statement", Line, {"limit": limit})


class AsyncEvents:
    """Events: what happened, for ever."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    def list(
        self,
        *,
        type: str | None = None,
        created_from: datetime | None = None,
        created_to: datetime | None = None,
        limit: int = 100,
    ) -> AsyncIterator[Event]:
        """All events, newest first. type: one, or `payment.*`. limit: how many are fetched at a time."""
        query = {"type": type, "created_from": created_from, "created_to": created_to, "limit": limit}
        return self._kassa.each("/v1/events", Event, query)

    async def redeliver(self, event: str, *, idempotency_key: str | None = None) -> tuple[Delivery, ...]:
        """Delivers one event again to the webhook endpoints that want it. Raises EventNotFound."""
        path = f"/v1/events/{_part(event)}/redeliver"
        return (await self._kassa.post(path, Page[Delivery], key=idempotency_key)).data


class AsyncWebhookEndpoints:
    """Webhook endpoints: where the merchant wants to be told."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    async def create(
        self,
        *,
        url: str,
        events: Sequence[str] = ("*",),
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> WebhookEndpoint:
        """A new endpoint; its `secret` is shown here and never again."""
        body = _given(url=url, events=events, description=description)
        return await self._kassa.post("/v1/webhook_endpoints", WebhookEndpoint, body, key=idempotency_key)

    async def get(self, endpoint: str) -> WebhookEndpoint:
        """An endpoint as it stands now. Raises WebhookEndpointNotFound."""
        return await self._kassa.get(f"/v1/webhook_endpoints/{_part(endpoint)}", WebhookEndpoint)

    def list(self, *, limit: int = 100) -> AsyncIterator[WebhookEndpoint]:
        """All endpoints. limit: how many are fetched at a time."""
        return self._kassa.each("/v1/webhook_endpoints", WebhookEndpoint, {"limit": limit})

    async def update(
        self,
        endpoint: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        state: str | None = None,
    ) -> WebhookEndpoint:
        """Sets what is given and leaves the rest. state: enabled or disabled. Raises WebhookEndpointNotFound."""
        body = _given(url=url, events=events, description=description, state=state)
        return await self._kassa.patch(f"/v1/webhook_endpoints/{_part(endpoint)}", WebhookEndpoint, body)

    async def delete(self, endpoint: str) -> None:
        """Nothing is delivered to it any more. Raises WebhookEndpointNotFound."""
        await self._kassa.delete(f"/v1/webhook_endpoints/{_part(endpoint)}")

    def deliveries(self, endpoint: str, *, state: str | None = None, limit: int = 100) -> AsyncIterator[Delivery]:
        """What was sent to it and what it answered, newest first. limit: how many are fetched at a time."""
        path = f"/v1/webhook_endpoints/{_part(endpoint)}/deliveries"
        return self._kassa.each(path, Delivery, {"state": state, "limit": limit})

    async def rotate_secret(self, endpoint: str, *, idempotency_key: str | None = None) -> WebhookEndpoint:
        """A new `secret`; for a while webhooks are signed with the old one too. Raises WebhookEndpointNotFound."""
        path = f"/v1/webhook_endpoints/{_part(endpoint)}/rotate_secret"
        return await self._kassa.post(path, WebhookEndpoint, key=idempotency_key)

    async def replay(
        self, endpoint: str, *, created_from: datetime, created_to: datetime, idempotency_key: str | None = None
    ) -> Replay:
        """Delivers all events of a time again. Raises WebhookEndpointNotFound."""
        body = {"created_from": created_from, "created_to": created_to}
        path = f"/v1/webhook_endpoints/{_part(endpoint)}/replay"
        return await self._kassa.post(path, Replay, body, key=idempotency_key)


class AsyncBalances:
    """The merchant's own money."""

    def __init__(self, kassa: AsyncKassa) -> None:
        self._kassa = kassa

    async def get(self, *, at: datetime | None = None) -> tuple[Balance, ...]:
        """One balance per currency. at: as it was then."""
        return (await self._kassa.get("/v1/balances", Page[Balance], {"at": at})).data

    def statement(
        self, *, currency: str | None = None, account: str = "merchant_payable", limit: int = 100
    ) -> AsyncIterator[Line]:
        """What happened to one of the merchant's accounts, newest first, without gaps. currency: needed where there are
        several."""
        query = {"currency": currency, "account": account, "limit": limit}
        return self._kassa.each("/v1/balances/statement", Line, query)


def _in_doubt(failure: KassaError, key: str) -> KassaError:
    """The failure of the last try, when an earlier one may have been processed."""
    if failure.facts.get("outcome") == "unknown":
        return failure
    return OutcomeUnknown(idempotency_key=key, outcome="unknown", last=failure.code)


def _given(**fields: Any) -> dict[str, Any]:
    """What is not given is left out, so that the server's defaults count."""
    return {name: value for name, value in fields.items() if value is not None}


def _plain(query: Mapping[str, Any] | None) -> dict[str, str]:
    """Query parameters as text."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else str(value)
        for name, value in (query or {}).items()
        if value is not None
    }


def _part(name: str) -> str:
    """A name as one part of a path, so that a strange one cannot reach another route."""
    return quote(name, safe="")


def _decode(body: bytes, answer: type[Answer], key: str | None = None) -> Answer:
    """An answer that cannot be read says nothing about what happened. Raises OutcomeUnknown, ServerUnreachable."""
    try:
        return msgspec.json.decode(body, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if key is None:
            raise ServerUnreachable(f"The answer cannot be read: {error}.") from error
        raise OutcomeUnknown(f"The answer cannot be read: {error}.", idempotency_key=key, outcome="unknown") from error
