"""A WeChat Pay sandbox as a real process, a merchant who signs by hand, and a shop that gets its callbacks."""

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from kassa.channels.wechat_crypto import authorization, load_private_key, request_text, sign

PATIENCE_S = 60.0
"""No wait in these tests takes longer, however busy the machine is."""


class SandboxProcess:
    """`python -m kassa.channels.sandbox.wechat` on a directory; can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sink = Shop()
        """Takes the callbacks that no test looks at, so that none is sent again and meets a fault meant for another."""
        self._sink_server = self.sink.serve()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "kassa.channels.sandbox.wechat", "--dir", str(self.directory), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.credentials: dict[str, str] = json.loads(self.process.stdout.readline())
        self._key = load_private_key(self.credentials["merchant_private_key_pem"])
        self.client = httpx.Client(base_url=self.credentials["base_url"], timeout=PATIENCE_S, trust_env=False)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self._gone()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        self._sink_server.shutdown()
        self._sink_server.server_close()
        return self._gone()

    def _gone(self) -> int:
        self.client.close()
        code = self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    # The control door

    def door(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.client.request(method, f"/_sandbox{path}", json=body)
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def fault(self, on: str, fault: str, **more: int) -> dict[str, Any]:
        return self.door("POST", "/faults", {"on": on, "fault": fault, **more})

    def settings(self, **changes: Any) -> None:
        self.door("POST", "/settings", changes)

    def pay(self, out_trade_no: str, **more: Any) -> dict[str, Any]:
        return self.door("POST", "/pay", {"out_trade_no": out_trade_no, **more})

    def charge(self, out_trade_no: str) -> dict[str, Any] | None:
        """The order as the provider's books have it."""
        charges: list[dict[str, Any]] = self.door("GET", f"/books?out_trade_no={out_trade_no}")["charges"]
        return charges[0] if charges else None

    def callbacks(self, number: str) -> list[dict[str, Any]]:
        return [notice for notice in self.door("GET", "/books")["callbacks"] if notice["number"] == number]

    # The merchant, by hand

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = PATIENCE_S
    ) -> httpx.Response:
        """A signed request in public-key mode. Raises httpx.TransportError when there is no answer."""
        raw = b"" if body is None else json.dumps(body).encode()
        headers = self.signed(method, path, raw)
        return self.client.request(method, path, content=raw, headers=headers, timeout=timeout_s)

    def signed(self, method: str, path: str, raw: bytes, *, at: float | None = None) -> dict[str, str]:
        """The headers of a request signed at `at` (now)."""
        timestamp, nonce = int(time.time() if at is None else at), secrets.token_hex(16)
        return {
            "Authorization": authorization(
                mchid=self.credentials["mchid"],
                serial_no=self.credentials["merchant_serial_no"],
                timestamp=timestamp,
                nonce=nonce,
                signature=sign(self._key, request_text(method, path, timestamp, nonce, raw)),
            ),
            "Content-Type": "application/json",
            "Wechatpay-Serial": self.credentials["platform_public_key_id"],
        }

    def order(self, number: str, **changes: Any) -> dict[str, Any]:
        """A native order of 100 fen that is right in every field."""
        order = {
            "appid": self.credentials["appid"],
            "mchid": self.credentials["mchid"],
            "description": "两杯咖啡",
            "out_trade_no": number,
            "notify_url": self.sink.url,
            "amount": {"total": 100, "currency": "CNY"},
        }
        return {**order, **changes}

    def create(self, number: str, kind: str = "native", **changes: Any) -> httpx.Response:
        return self.call("POST", f"/v3/pay/transactions/{kind}", self.order(number, **changes))

    def query(self, number: str) -> httpx.Response:
        return self.call("GET", f"{order_path(number)}?mchid={self.credentials['mchid']}")

    def close(self, number: str) -> httpx.Response:
        return self.call("POST", f"{order_path(number)}/close", {"mchid": self.credentials["mchid"]})

    def refund(self, number: str, out_refund_no: str, amount: int = 30, **changes: Any) -> httpx.Response:
        body = {
            "out_trade_no": number,
            "out_refund_no": out_refund_no,
            "amount": {"refund": amount, "total": 100, "currency": "CNY"},
        }
        return self.call("POST", "/v3/refund/domestic/refunds", {**body, **changes})

    def refund_query(self, out_refund_no: str) -> httpx.Response:
        return self.call("GET", f"/v3/refund/domestic/refunds/{out_refund_no}")

    def paid(self, **changes: Any) -> str:
        """The number of a fresh order that is paid."""
        number = new_number()
        assert self.create(number, **changes).status_code == 200
        self.pay(number)
        return number


def order_path(number: str) -> str:
    return f"/v3/pay/transactions/out-trade-no/{number}"


def new_number() -> str:
    return secrets.token_hex(14)


@dataclass
class Received:
    """One callback as it arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def is_probe(self) -> bool:
        return self.headers["wechatpay-signature"].startswith("WECHATPAY/SIGNTEST/")


@dataclass
class Shop:
    """A merchant's server: keeps what it gets and answers `status`."""

    status: int = 204
    received: list[Received] = field(default_factory=list)
    url: str = ""

    def wait_for(self, count: int) -> list[Received]:
        wait_until(lambda: len(self.received) >= count)
        return self.received

    def serve(self) -> ThreadingHTTPServer:
        shop = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                shop.received.append(Received({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(shop.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """The tests look at what was received instead."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{server.server_address[1]}/callback"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


def wait_until(holds: Callable[[], bool]) -> None:
    """Raises AssertionError when it does not come true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
