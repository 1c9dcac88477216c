"""A WeChat Pay that is not real: the provider's signed wire on loopback, with its own keys, books, payers and bad luck.

Strict about signatures, tolerant about form. `python -m kassa.channels.sandbox.wechat --dir DIR --port N --json` prints
the credentials of its one merchant when it is ready. It judges the channel file, so it does not import it.
"""

import argparse
import asyncio
import fcntl
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from kassa.channels.sandbox import http
from kassa.channels.sandbox.books import Books
from kassa.channels.sandbox.callbacks import Deliverer, key_for, signed_headers
from kassa.channels.sandbox.control import PREFIX as CONTROL
from kassa.channels.sandbox.control import Control
from kassa.channels.sandbox.faults import Armed, Fault, Faults
from kassa.channels.sandbox.http import Answer, Request
from kassa.channels.sandbox.identity import Identity, PlatformKey, save_identity, settle_identity
from kassa.channels.sandbox.wechat_operations import Operations, with_wrong_amount
from kassa.channels.sandbox.wechat_rules import Refusal, check_mchid, parameter, read_body
from kassa.channels.wechat_crypto import ALGORITHM, encrypt_resource, parse_authorization, request_text, verify
from kassa.errors import ChannelMessageInvalid

SKEW_S = 300
"""A signature's time may be so far from ours."""
NONCES_MAX = 50_000
"""Remembered against replay; bounded by number, so a flood shortens the memory instead of filling it."""
EXIT_REFUSED = 1

_GARBAGE = b"\x1f\x8bnot JSON"
_WIRE = "/v3/"

_ROUTES = [
    ("POST", re.compile(r"/v3/pay/transactions/(?P<kind>native|jsapi|h5|app)"), "create"),
    ("GET", re.compile(r"/v3/pay/transactions/out-trade-no/(?P<out_trade_no>[^/]+)"), "query"),
    ("GET", re.compile(r"/v3/pay/transactions/id/(?P<transaction_id>[^/]+)"), "query"),
    ("POST", re.compile(r"/v3/pay/transactions/out-trade-no/(?P<out_trade_no>[^/]+)/close"), "close"),
    ("POST", re.compile(r"/v3/refund/domestic/refunds"), "refund"),
    ("GET", re.compile(r"/v3/refund/domestic/refunds/(?P<out_refund_no>[^/]+)"), "refund_query"),
    ("POST", re.compile(r"/v3/refund/domestic/refunds/(?P<refund_id>[^/]+)/apply-abnormal-refund"), "abnormal_refund"),
    ("GET", re.compile(r"/v3/certificates"), "certificates"),
]


@dataclass(frozen=True, slots=True)
class _Call:
    """An authenticated request and the operation that it asks for."""

    operation: str
    names: dict[str, str]
    request: Request
    serial: str
    """The platform key that the merchant wants the answer signed with; empty in certificate mode."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """What the provider says, before it is signed."""

    status: int
    body: bytes
    code: str = "0"


class Wire:
    """The merchant's door: authenticates, meets the armed fault, operates, signs."""

    def __init__(self, operations: Operations, faults: Faults, *, wake: Callable[[], None]) -> None:
        self._operations = operations
        self._faults = faults
        self._wake = wake
        self._nonces: dict[str, None] = {}
        self._overtaken: list[asyncio.Event] = []

    async def answer(self, request: Request) -> Answer | None:
        """The provider's answer; None hangs up."""
        try:
            key = self._answering_key(request)
        except Refusal as refusal:
            return self._signed(_refused(refusal), self._certificate())
        try:
            nonce = self._authenticate(request)
            call = _route(request)
        except Refusal as refusal:
            return self._signed(_refused(refusal), key)
        fault = self._faults.take(call.operation)
        if fault is not None and fault.fault in (Fault.DROP_BEFORE, Fault.STATUS_5XX, Fault.STATUS_429, Fault.MISSING):
            return await _unprocessed(fault)
        self._remember(nonce)
        if fault is None:
            answer = self._signed(self._operate(call), key)
            self._let_pass()
            return answer
        return await self._processed(call, fault, key)

    async def _processed(self, call: _Call, fault: Armed, key: PlatformKey) -> Answer | None:
        """The faults under which the operation happens."""
        match fault.fault:
            case Fault.LATE:
                await asyncio.sleep(fault.delay_s)
            case Fault.REORDER:
                await self._be_overtaken(fault.delay_s)
            case Fault.DUPLICATE:
                self._operate(call)
        judged = self._operate(call, is_wrong=fault.fault is Fault.WRONG_AMOUNT)
        self._let_pass()
        match fault.fault:
            case Fault.DROP_AFTER:
                return None
            case Fault.DELAY:
                await asyncio.sleep(fault.delay_s)
            case Fault.GARBAGE:
                return self._signed(_Judged(200, _GARBAGE), key)
            case Fault.BAD_SIGNATURE:
                return self._signed(judged, key, is_forged=True)
        return self._signed(judged, key)

    # Who asks

    def _authenticate(self, request: Request) -> str:
        """The nonce of a request that its merchant signed just now and that was not seen before. Raises Refusal."""
        try:
            parts = parse_authorization(request.headers.get("authorization", ""))
        except ChannelMessageInvalid as fault:
            raise _sign_error(str(fault.detail)) from None
        identity = self._operations.identity
        if parts["mchid"] != identity.mchid:
            raise _sign_error("the mchid is not known")
        if parts["serial_no"].upper() != identity.merchant_serial_no:
            raise _sign_error("the serial_no is not that of the merchant's certificate")
        timestamp, nonce = parts["timestamp"], parts["nonce_str"]
        if not re.fullmatch(r"[0-9]{1,12}", timestamp) or abs(time.time() - int(timestamp)) > SKEW_S:
            raise _sign_error(f"the timestamp is more than {SKEW_S} seconds off")
        text = request_text(request.method, request.target, timestamp, nonce, request.body)
        if not verify(identity.merchant_public_key, text, parts["signature"]):
            raise _sign_error("the signature does not match", request=request, text=text)
        if nonce in self._nonces:
            raise _sign_error("this nonce_str was used before")
        return nonce

    def _remember(self, nonce: str) -> None:
        self._nonces[nonce] = None
        if len(self._nonces) > NONCES_MAX:
            del self._nonces[next(iter(self._nonces))]

    # What is done

    def _operate(self, call: _Call, *, is_wrong: bool = False) -> _Judged:
        """One operation, judged by the provider's rules. is_wrong: plant a wrong amount."""
        try:
            shown = self._perform(call, is_wrong=is_wrong)
        except Refusal as refusal:
            return _refused(refusal)
        if shown is None:
            return _Judged(204, b"")
        return _Judged(200, _json(with_wrong_amount(shown) if is_wrong else shown))

    def _perform(self, call: _Call, *, is_wrong: bool) -> dict[str, Any] | None:
        operations, names = self._operations, call.names
        match call.operation:
            case "create":
                return operations.create(
                    names["kind"], read_body(call.request.body), serial=call.serial, extra=1 if is_wrong else 0
                )
            case "query":
                self._check_mchid_of_query(call.request)
                return operations.query(names.get("out_trade_no"), names.get("transaction_id"))
            case "close":
                check_mchid(read_body(call.request.body).get("mchid"), operations.identity.mchid)
                operations.close(names["out_trade_no"])
                return None
            case "refund":
                refund = operations.refund(read_body(call.request.body), serial=call.serial)
                self._wake()
                return refund
            case "refund_query":
                return operations.refund_query(names["out_refund_no"])
            case "abnormal_refund":
                refund = operations.abnormal_refund(
                    names["refund_id"], read_body(call.request.body), serial=call.serial
                )
                self._wake()
                return refund
        return _certificates(operations.identity)

    def _check_mchid_of_query(self, request: Request) -> None:
        given = parse_qs(request.query).get("mchid", [None])[0]
        check_mchid(given, self._operations.identity.mchid, location="query")

    # What is said

    def _answering_key(self, request: Request) -> PlatformKey:
        """The key that the request asks for. Raises Refusal when it is not one of ours, or not any more."""
        serial = request.headers.get("wechatpay-serial", "")
        if not serial:
            return self._certificate()
        identity = self._operations.identity
        for key in (*identity.public_keys, *identity.certificates):
            if key.serial == serial or key.serial == serial.upper():
                return key
        raise parameter("Wechatpay-Serial", "is not a platform key that is in use", serial, "header")

    def _certificate(self) -> PlatformKey:
        return key_for(self._operations.identity, "certificate", "")

    def _signed(self, judged: _Judged, key: PlatformKey, *, is_forged: bool = False) -> Answer:
        headers = signed_headers(self._operations.identity, key, judged.body, is_forged=is_forged)
        headers["Request-ID"] = f"08{secrets.token_hex(14).upper()}-{judged.code}"
        return Answer(judged.status, headers, judged.body)

    # Order of requests

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


async def _unprocessed(fault: Armed) -> Answer | None:
    """The faults under which nothing happens. What a gateway in front says is not signed."""
    match fault.fault:
        case Fault.STATUS_5XX:
            return _unsigned(500, "SYSTEM_ERROR", "系统异常, 请稍后重试")
        case Fault.STATUS_429:
            return _unsigned(429, "FREQUENCY_LIMITED", "频率超限, 请降低请求频率")
        case Fault.MISSING:
            await asyncio.sleep(fault.delay_s)
    return None


def _unsigned(status: int, code: str, message: str) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", "Request-ID": f"08{secrets.token_hex(14).upper()}-0"}
    return Answer(status, headers, _json({"code": code, "message": message}))


def _route(request: Request) -> _Call:
    """The operation. Raises Refusal."""
    serial = request.headers.get("wechatpay-serial", "")
    is_known_path = False
    for method, pattern, operation in _ROUTES:
        found = pattern.fullmatch(request.path)
        if found is None:
            continue
        is_known_path = True
        if method == request.method:
            _check_media_type(request)
            names = {name: unquote(value) for name, value in found.groupdict().items()}
            return _Call(operation, names, request, serial)
    if is_known_path:
        raise Refusal(405, "METHOD_NOT_ALLOWED", "请求方法不支持")
    raise Refusal(404, "RESOURCE_NOT_EXISTS", "无此接口")


def _check_media_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    if request.method == "POST" and given.partition(";")[0].strip().lower() != "application/json":
        raise parameter("Content-Type", "must be application/json", given, "header")


def _refused(refusal: Refusal) -> _Judged:
    return _Judged(refusal.status, _json(refusal.body()), code="268435463")


def _sign_error(issue: str, *, request: Request | None = None, text: bytes = b"") -> Refusal:
    """401 SIGN_ERROR. When the signature is what is wrong it shows what should have been signed, as the provider does."""
    detail: dict[str, Any] = {"field": "signature", "location": "authorization", "issue": issue}
    if request is not None:
        detail["sign_information"] = {
            "method": request.method,
            "url": request.target,
            "sign_message_length": len(text),
            "truncated_sign_message": text[:256].decode("utf-8", "replace"),
        }
    return Refusal(401, "SIGN_ERROR", f"签名错误: {issue}", detail)


def _certificates(identity: Identity) -> dict[str, Any]:
    """All platform certificates in use, each under the APIv3 key; the newest first."""
    return {"data": [_sealed(identity, key) for key in reversed(identity.certificates)]}


def _sealed(identity: Identity, key: PlatformKey) -> dict[str, Any]:
    nonce = secrets.token_hex(6)
    plaintext = key.public_pem.encode()
    return {
        "serial_no": key.serial,
        "effective_time": key.effective_time,
        "expire_time": key.expire_time,
        "encrypt_certificate": {
            "algorithm": ALGORITHM,
            "nonce": nonce,
            "associated_data": "certificate",
            "ciphertext": encrypt_resource(
                identity.apiv3_key.encode(), nonce=nonce, associated_data="certificate", plaintext=plaintext
            ),
        },
    }


def _json(shown: dict[str, Any]) -> bytes:
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode()


# The process


async def serve(
    directory: Path, port: int, *, ready: Callable[[dict[str, str]], None], host: str = "127.0.0.1"
) -> None:
    """Run the sandbox that lives in `directory` until cancelled. `ready` gets its credentials once it can be called.

    port: 0 is the one that this directory had before, else a free one that it keeps. Raises BlockingIOError when another
    process has the directory, OSError when the port is taken.
    """
    lock = _lock(directory)
    try:
        await _serve(directory, settle_identity(directory, port), host, ready)
    finally:
        os.close(lock)


async def _serve(directory: Path, identity: Identity, host: str, ready: Callable[[dict[str, str]], None]) -> None:
    books, faults = Books(directory), Faults()
    operations = Operations(books, identity)
    deliverer = Deliverer(books, faults, operations)
    wire = Wire(operations, faults, wake=deliverer.wake)
    control = Control(operations, faults, wake=deliverer.wake, keep=lambda rotated: save_identity(directory, rotated))

    async def answer(request: Request) -> Answer | None:
        if request.path == CONTROL or request.path.startswith(CONTROL + "/"):
            return control.answer(request)
        return await wire.answer(request)

    server = await http.listen(answer, host, identity.port)
    try:
        ready(identity.credentials())
        await deliverer.run()
    finally:
        server.close()
        books.close()


def _lock(directory: Path) -> int:
    """Two processes on one set of books would each tell half of the truth. Held until the process ends, however it ends."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    return lock


async def _run(directory: Path, port: int, host: str, ready: Callable[[dict[str, str]], None]) -> None:
    task = asyncio.ensure_future(serve(directory, port, ready=ready, host=host))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


def main() -> int:
    """The process `kassa sandbox wechat`."""
    parser = argparse.ArgumentParser(description="A WeChat Pay sandbox with the provider's signed wire.")
    parser.add_argument("--dir", type=Path, required=True, help="where its keys and books live")
    parser.add_argument("--port", type=int, default=0, help="0: the one it had before, or a free one")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; the control door opens for loopback only")
    parser.add_argument("--json", action="store_true", help="print the credentials as one JSON line when ready")
    options = parser.parse_args()

    def ready(credentials: dict[str, str]) -> None:
        shown = json.dumps(credentials) if options.json else f"WeChat Pay sandbox at {credentials['base_url']}"
        print(shown, flush=True)

    os.umask(0o077)
    try:
        asyncio.run(_run(options.dir, options.port, options.host, ready))
    except BlockingIOError:
        print(f"another sandbox runs in {options.dir}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as fault:
        print(f"the sandbox cannot start: {fault}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
