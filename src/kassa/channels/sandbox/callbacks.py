"""WeChat Pay's callbacks: encrypted, signed, and sent again by the provider's own schedule until the merchant takes them.

`signed_callback` also serves benchmarks, which need many of them quickly.
"""

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from kassa.channels.sandbox import http
from kassa.channels.sandbox.books import Books, Notice
from kassa.channels.sandbox.faults import CALLBACK, Armed, Fault, Faults
from kassa.channels.sandbox.identity import Identity, PlatformKey
from kassa.channels.sandbox.wechat_operations import Operations, with_wrong_amount
from kassa.channels.sandbox.wechat_rules import wire_time
from kassa.channels.wechat_crypto import ALGORITHM, SCHEME, encrypt_resource, response_text, sign

RETRIES_S = (15, 15, 30, 180, 600, 1200, 1800, 1800, 1800, 3600, 10800, 10800, 10800, 21600, 21600)
"""After each try that was not taken. After the last one the provider gives up."""
REPLY_TIMEOUT_S = 5.0
"""The merchant has so long to answer."""
IN_FLIGHT_MAX = 64
LOOK_AGAIN_S = 0.25
"""When all that is due is on its way already."""
PROBE_MARK = "WECHATPAY/SIGNTEST/"
"""How the signature of a probe begins: a callback that must be refused."""

_SUMMARIES = {
    "TRANSACTION.SUCCESS": "支付成功",
    "REFUND.SUCCESS": "退款成功",
    "REFUND.ABNORMAL": "退款异常",
    "REFUND.CLOSED": "退款关闭",
}


def signed_callback(
    identity: Identity, transaction: dict[str, Any], *, event_type: str = "TRANSACTION.SUCCESS", serial: str = ""
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a callback that says `transaction` (or a refund), as the provider would send it now.

    serial: what the merchant's requests carry as `Wechatpay-Serial`; a PUB_KEY_ID_… gives a callback in public-key
    mode, else the platform certificate signs it.
    """
    kind = event_type.partition(".")[0].lower()
    plaintext = json.dumps(transaction, ensure_ascii=False, separators=(",", ":")).encode()
    body = envelope(identity.apiv3_key, secrets.token_hex(16), kind, event_type, plaintext, now=time.time())
    return signed_headers(identity, key_for(identity, "as_asked", serial), body), body


def envelope(apiv3_key: str, notice_id: str, kind: str, event_type: str, plaintext: bytes, *, now: float) -> bytes:
    """The body of a callback, its resource encrypted."""
    nonce = secrets.token_hex(6)
    ciphertext = encrypt_resource(apiv3_key.encode(), nonce=nonce, associated_data=kind, plaintext=plaintext)
    shown = {
        "id": notice_id,
        "create_time": wire_time(now),
        "resource_type": "encrypt-resource",
        "event_type": event_type,
        "summary": _SUMMARIES.get(event_type, event_type),
        "resource": {
            "original_type": kind,
            "algorithm": ALGORITHM,
            "ciphertext": ciphertext,
            "associated_data": kind,
            "nonce": nonce,
        },
    }
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode()


def signed_headers(identity: Identity, key: PlatformKey, body: bytes, *, is_forged: bool = False) -> dict[str, str]:
    """The provider's signature headers over `body`, for a callback and for an answer alike.

    is_forged: sign another text, so that it is a signature, but not of this.
    """
    timestamp, nonce = int(time.time()), secrets.token_hex(16).upper()
    text = response_text(timestamp, nonce, body + b" " if is_forged else body)
    return {
        "Content-Type": "application/json; charset=utf-8",
        "Wechatpay-Timestamp": str(timestamp),
        "Wechatpay-Nonce": nonce,
        "Wechatpay-Signature": sign(identity.signing_keys[key.serial], text),
        "Wechatpay-Signature-Type": SCHEME,
        "Wechatpay-Serial": key.serial,
    }


def key_for(identity: Identity, choice: str, serial: str) -> PlatformKey:
    """The current key of the kind that `choice` names, or that the merchant's own `Wechatpay-Serial` is of."""
    is_bare = choice == "public_key" or (choice == "as_asked" and serial.startswith("PUB_KEY_ID_"))
    return identity.public_keys[-1] if is_bare else identity.certificates[-1]


@dataclass(frozen=True, slots=True)
class _Message:
    """One sending: what it says and how it is signed."""

    headers: dict[str, str]
    body: bytes


class Deliverer:
    """Sends what is due, and lets refunds succeed when their time has come. The plan is in the books, not here."""

    def __init__(self, books: Books, faults: Faults, operations: Operations) -> None:
        self._books = books
        self._faults = faults
        self._operations = operations
        self._awake = asyncio.Event()
        self._in_flight: dict[str, asyncio.Task[None]] = {}
        self._overtaken: list[asyncio.Event] = []
        self._count = 0

    def wake(self) -> None:
        """Something new may be due."""
        self._awake.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._awake.clear()
                moved = self._operations.let_refunds_succeed()
                started = self._start_due()
                await self._pause(least_s=0.0 if moved or started else LOOK_AGAIN_S)
        finally:
            for task in self._in_flight.values():
                task.cancel()

    async def _pause(self, *, least_s: float) -> None:
        due_s = self._books.next_due_s()
        timeout_s = None if due_s is None else max(due_s, least_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._awake.wait()
        except TimeoutError:
            return

    def _start_due(self) -> int:
        started = 0
        for notice in self._books.due_notices(IN_FLIGHT_MAX):
            if notice.id in self._in_flight or len(self._in_flight) >= IN_FLIGHT_MAX:
                continue
            self._start(notice)
            started += 1
        return started

    def _start(self, notice: Notice) -> None:
        """The next try is planned before this one leaves: whatever happens to us, the merchant hears of it again."""
        wait_s = RETRIES_S[min(notice.tries, len(RETRIES_S) - 1)] / self._books.settings.callback_speed
        planned = replace(notice, tries=notice.tries + 1, next_at=self._books.now() + wait_s)
        self._books.put_notice(planned)
        task = asyncio.get_running_loop().create_task(self._deliver(planned))
        self._in_flight[notice.id] = task
        task.add_done_callback(lambda _: self._landed(notice.id))

    def _landed(self, notice_id: str) -> None:
        del self._in_flight[notice_id]
        self.wake()

    async def _deliver(self, notice: Notice) -> None:
        fault = self._faults.take(CALLBACK)
        match fault.fault if fault else None:
            case Fault.MISSING:
                self._books.put_notice(replace(notice, state="missing", next_at=None))
                return
            case Fault.LATE if fault:
                at = self._books.now() + fault.delay_s
                self._books.put_notice(replace(notice, tries=notice.tries - 1, next_at=at))
                return
            case Fault.REORDER if fault:
                await self._be_overtaken(fault.delay_s)
            case Fault.DELAY if fault:
                await asyncio.sleep(fault.delay_s)
        if notice.tries == 1:
            await self._probe(notice)
        is_taken = await self._try(notice, fault)
        self._let_pass()
        if is_taken:
            self._books.put_notice(replace(notice, state="taken", next_at=None))
        elif notice.tries > len(RETRIES_S):
            self._books.put_notice(replace(notice, state="given_up", next_at=None))

    async def _try(self, notice: Notice, fault: Armed | None) -> bool:
        """Send it once, with the fault that this try meets. Whether the merchant took it."""
        what = fault.fault.value if fault else "callback"
        message = self._message(notice, fault)
        match fault.fault if fault else None:
            case Fault.DROP_BEFORE:
                await http.connect_and_leave(notice.url, timeout_s=REPLY_TIMEOUT_S)
                return self._not_taken(notice, what, None)
            case Fault.DROP_AFTER:
                await http.post_and_leave(notice.url, message.headers, message.body, timeout_s=REPLY_TIMEOUT_S)
                return self._not_taken(notice, what, None)
            case Fault.STATUS_5XX | Fault.STATUS_429 | Fault.GARBAGE | Fault.BAD_SIGNATURE:
                return self._not_taken(notice, what, await _post(notice.url, message))
            case Fault.DUPLICATE:
                second = self._message(notice, None)
                statuses = await asyncio.gather(_post(notice.url, message), _post(notice.url, second))
                for status in statuses:
                    self._books.record_delivery(notice.id, what, status)
                return any(_is_taken(status) for status in statuses)
            case _:
                status = await _post(notice.url, message)
                self._books.record_delivery(notice.id, what, status)
                return _is_taken(status)

    def _not_taken(self, notice: Notice, what: str, status: int | None) -> bool:
        self._books.record_delivery(notice.id, what, status)
        return False

    def _message(self, notice: Notice, fault: Armed | None) -> _Message:
        kind = fault.fault if fault else None
        identity = self._operations.identity
        plaintext = notice.plaintext
        if kind is Fault.WRONG_AMOUNT:
            plaintext = json.dumps(with_wrong_amount(json.loads(plaintext)), ensure_ascii=False)
        body = envelope(
            identity.apiv3_key,
            notice.id,
            notice.kind,
            notice.event_type,
            plaintext.encode(),
            now=self._books.now(),
        )
        if kind is Fault.GARBAGE:
            body = b"<html>\xef\xbf\xbd not what you expect"
        key = key_for(identity, self._books.settings.callback_key, notice.serial)
        return _Message(signed_headers(identity, key, body, is_forged=kind is Fault.BAD_SIGNATURE), body)

    async def _probe(self, notice: Notice) -> None:
        """Now and then, ask whether the merchant checks signatures at all. A 2xx in the books is the merchant's fault."""
        self._count += 1
        every = self._books.settings.signtest_every
        if not every or self._count % every:
            return
        message = self._message(notice, None)
        signature = PROBE_MARK + message.headers["Wechatpay-Signature"][len(PROBE_MARK) :]
        probe = replace(message, headers={**message.headers, "Wechatpay-Signature": signature})
        self._books.record_delivery(notice.id, "probe", await _post(notice.url, probe))

    async def _be_overtaken(self, delay_s: float) -> None:
        passed = asyncio.Event()
        self._overtaken.append(passed)
        try:
            async with asyncio.timeout(delay_s):
                await passed.wait()
        except TimeoutError:
            self._overtaken.remove(passed)

    def _let_pass(self) -> None:
        while self._overtaken:
            self._overtaken.pop().set()


async def _post(url: str, message: _Message) -> int | None:
    return await http.post(url, message.headers, message.body, timeout_s=REPLY_TIMEOUT_S)


def _is_taken(status: int | None) -> bool:
    return status is not None and 200 <= status < 300
