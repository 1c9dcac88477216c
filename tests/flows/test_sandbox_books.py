"""The sandbox's own truth: books that survive kill -9, keys that stay, a clock that can be moved, a door for this machine."""

import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.wechat_sandbox import PATIENCE_S, SandboxProcess, Shop, new_number, wait_until
from kassa.channels.sandbox.books import Books
from kassa.channels.sandbox.callbacks import RETRIES_S, signed_callback
from kassa.channels.sandbox.control import Control
from kassa.channels.sandbox.faults import Faults
from kassa.channels.sandbox.http import Request
from kassa.channels.sandbox.identity import load_identity
from kassa.channels.sandbox.wechat_operations import Operations
from kassa.channels.wechat_crypto import load_public_key, response_text, verify


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxProcess]:
    running = SandboxProcess(tmp_path / "wechat")
    running.settings(signtest_every=0, refund_delay_ms=50, refund_gap_s=0)
    yield running
    running.stop()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    server = shop.serve()
    yield shop
    server.shutdown()
    server.server_close()


def test_what_was_answered_survives_kill_nine(sandbox: SandboxProcess) -> None:
    """Killed in the middle of a stream of orders and payments; every answer is in the books afterwards."""
    created: list[str] = []
    paid: list[str] = []

    def shop_around() -> None:
        while True:
            number = new_number()
            try:
                if sandbox.create(number).status_code == 200:
                    created.append(number)
                sandbox.pay(number)
            except (httpx.TransportError, RuntimeError):
                return
            paid.append(number)

    callers = [threading.Thread(target=shop_around) for _ in range(3)]
    for caller in callers:
        caller.start()
    wait_until(lambda: len(paid) >= 30)
    sandbox.process.kill()
    for caller in callers:
        caller.join(PATIENCE_S)
    sandbox.kill()
    before = sandbox.credentials
    sandbox.start()

    charges = {charge["out_trade_no"]: charge for charge in sandbox.door("GET", "/books")["charges"]}
    assert sandbox.credentials == before
    assert set(created) <= charges.keys()
    assert {charges[number]["state"] for number in paid} == {"SUCCESS"}


def test_a_callback_that_was_due_is_sent_after_a_restart(sandbox: SandboxProcess, shop: Shop) -> None:
    shop.status = 500
    sandbox.settings(callback_speed=30.0)
    number = sandbox.paid(notify_url=shop.url)
    shop.wait_for(1)
    sandbox.kill()
    shop.status = 200

    sandbox.start()

    wait_until(lambda: [callback["state"] for callback in sandbox.callbacks(number)] == ["taken"])


def test_a_refund_under_way_succeeds_after_a_restart(sandbox: SandboxProcess) -> None:
    number = sandbox.paid()
    sandbox.settings(refund_delay_ms=500)
    assert sandbox.refund(number, number).json()["status"] == "PROCESSING"
    sandbox.kill()

    sandbox.start()

    wait_until(lambda: sandbox.refund_query(number).json()["status"] == "SUCCESS")


def test_the_schedule_is_the_providers_and_ends(sandbox: SandboxProcess, shop: Shop) -> None:
    shop.status = 500
    sandbox.settings(callback_speed=10_000_000.0)

    number = sandbox.paid(notify_url=shop.url)

    wait_until(lambda: [callback["state"] for callback in sandbox.callbacks(number)] == ["given_up"])
    assert sandbox.callbacks(number)[0]["tries"] == 1 + len(RETRIES_S) == 16
    assert sum(RETRIES_S) == 15 + 15 + 30 + 180 + 600 + 1200 + 3 * 1800 + 3600 + 3 * 10800 + 2 * 21600


def test_keys_and_books_are_for_the_owner_only(sandbox: SandboxProcess) -> None:
    sandbox.paid()

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in sandbox.directory.iterdir()}

    assert set(modes.values()) == {0o600}
    assert "identity.json" in modes


def test_two_sandboxes_never_share_a_directory(sandbox: SandboxProcess) -> None:
    command = [sys.executable, "-m", "kassa.channels.sandbox.wechat", "--dir", str(sandbox.directory), "--json"]

    second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    assert second.returncode == 1
    assert "another sandbox" in second.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly(sandbox: SandboxProcess, number: signal.Signals) -> None:
    sandbox.process.send_signal(number)

    assert sandbox.process.wait(PATIENCE_S) == 0


# The payer


def test_a_payer_pays_by_code_once(sandbox: SandboxProcess) -> None:
    number = new_number()
    code_url = sandbox.create(number).json()["code_url"]

    declined = sandbox.door("POST", "/decline", {"code_url": code_url})
    paid = sandbox.door("POST", "/pay", {"code_url": code_url, "payer": "openid-7"})
    again = sandbox.client.post("/_sandbox/pay", json={"code_url": code_url})

    assert declined["state"] == "NOTPAY"
    assert (paid["state"], paid["openid"], paid["amount"]) == ("SUCCESS", "openid-7", 100)
    assert again.status_code == 409
    assert sandbox.query(number).json()["payer"] == {"openid": "openid-7"}


def test_a_closed_order_is_paid_only_when_that_is_asked_for(sandbox: SandboxProcess, shop: Shop) -> None:
    number = new_number()
    sandbox.create(number, notify_url=shop.url)
    sandbox.close(number)

    refused = sandbox.client.post("/_sandbox/pay", json={"out_trade_no": number})
    late = sandbox.pay(number, after_close=True)

    assert refused.status_code == 409
    assert late["state"] == "SUCCESS"
    assert sandbox.query(number).json()["trade_state"] == "SUCCESS"
    shop.wait_for(1)


def test_time_passes_when_told(sandbox: SandboxProcess) -> None:
    """Codes grow old, are renewed by the same order, and an order that nobody paid closes by itself at last."""
    number = new_number()
    code_url = sandbox.create(number).json()["code_url"]
    sandbox.door("POST", "/clock", {"advance_s": 2 * 3600 + 1})

    old = sandbox.client.post("/_sandbox/pay", json={"code_url": code_url})
    sandbox.create(number)
    sandbox.door("POST", "/clock", {"advance_s": 7 * 86_400})
    expired = sandbox.client.post("/_sandbox/pay", json={"out_trade_no": number})
    sandbox.door("POST", "/clock", {"advance_s": 7 * 86_400})

    assert "two hours" in old.json()["error"]
    assert "expired" in expired.json()["error"]
    assert sandbox.query(number).json()["trade_state"] == "CLOSED"


# The bank


def test_a_refund_can_become_abnormal_or_come_back(sandbox: SandboxProcess, shop: Shop) -> None:
    number = sandbox.paid()
    abnormal, reversed_ = new_number(), new_number()
    for out_refund_no in (abnormal, reversed_):
        sandbox.refund(number, out_refund_no, 50, notify_url=shop.url)
    wait_until(lambda: (sandbox.charge(number) or {})["refunded"] == 100)

    sandbox.door("POST", "/refunds", {"out_refund_no": abnormal, "state": "ABNORMAL"})
    sandbox.door("POST", "/refunds", {"out_refund_no": reversed_, "state": "REVERSED"})

    assert sandbox.refund_query(abnormal).json()["status"] == "ABNORMAL"
    assert sandbox.refund_query(reversed_).json()["status"] == "CLOSED"
    states = {refund["out_refund_no"]: refund["state"] for refund in sandbox.door("GET", "/books")["refunds"]}
    assert states == {abnormal: "ABNORMAL", reversed_: "REVERSED"}
    assert (sandbox.charge(number) or {})["refunded"] == 0
    shop.wait_for(4)
    events = [callback["event_type"] for callback in sandbox.callbacks(abnormal)]
    assert sorted(events) == ["REFUND.ABNORMAL", "REFUND.SUCCESS"]
    assert sandbox.refund(number, new_number(), 50).status_code == 200


# The door


def test_a_new_bare_key_signs_and_the_old_one_still_does_when_asked(sandbox: SandboxProcess) -> None:
    old = sandbox.credentials
    new = sandbox.door("POST", "/rotate_key", {"kind": "public_key"})

    by_old = sandbox.query("n" * 20)
    sandbox.credentials = new
    by_new = sandbox.query("n" * 20)

    assert by_old.headers["wechatpay-serial"] == old["platform_public_key_id"]
    assert by_new.headers["wechatpay-serial"] == new["platform_public_key_id"]
    assert old["platform_public_key_id"] != new["platform_public_key_id"]
    assert new == load_identity(sandbox.directory).credentials()  # type: ignore[union-attr]


WRONG_CALLS: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "/pay", {}, 400),
    ("POST", "/pay", {"out_trade_no": "unknown"}, 404),
    ("POST", "/pay", {"out_trade_no": 7}, 400),
    ("POST", "/pay", {"out_trade_no": "n", "after_close": "yes"}, 400),
    ("POST", "/pay", {"number": "n"}, 400),
    ("POST", "/refunds", {"out_refund_no": "unknown", "state": "ABNORMAL"}, 404),
    ("POST", "/refunds", {"out_refund_no": "unknown", "state": "LOST"}, 400),
    ("POST", "/clock", {"advance_s": -1}, 400),
    ("POST", "/clock", {"advance_s": True}, 400),
    ("POST", "/settings", {"refund_gap_s": "x"}, 400),
    ("POST", "/settings", {"clock_offset_s": 1}, 400),
    ("POST", "/rotate_key", {"kind": "house"}, 400),
    ("POST", "/books", {}, 405),
    ("POST", "/nothing", {}, 404),
]


def test_the_door_says_what_is_wrong(sandbox: SandboxProcess) -> None:
    for method, path, body, status in WRONG_CALLS:
        answer = sandbox.client.request(method, f"/_sandbox{path}", json=body)

        assert (path, body, answer.status_code) == (path, body, status)
        assert answer.json()["error"]


def test_the_door_is_closed_to_other_machines(sandbox: SandboxProcess, tmp_path: Path) -> None:
    """Judged by the connection's own address, so no header opens it."""
    identity = load_identity(sandbox.directory)
    assert identity is not None
    books = Books(tmp_path)
    control = Control(Operations(books, identity), Faults(), wake=lambda: None, keep=lambda _: None)

    answers = [
        control.answer(Request("GET", "/_sandbox", {"x-forwarded-for": "127.0.0.1"}, b"", peer))
        for peer in ("192.0.2.7", "2001:db8::7", "127.0.0.1", "::1")
    ]

    assert [answer.status for answer in answers] == [403, 403, 200, 200]
    books.close()


def test_totals_count_without_listing(sandbox: SandboxProcess) -> None:
    sandbox.paid()
    sandbox.create(new_number())

    totals = sandbox.door("GET", "/books?totals=1")

    assert totals["charges"] == {"SUCCESS": {"count": 1, "amount": 100}, "NOTPAY": {"count": 1, "amount": 100}}


def test_callbacks_for_a_benchmark_are_the_real_thing(sandbox: SandboxProcess) -> None:
    identity = load_identity(sandbox.directory)
    assert identity is not None
    serial = identity.public_keys[-1].serial

    headers, body = signed_callback(identity, {"out_trade_no": "n", "amount": {"total": 1}}, serial=serial)

    text = response_text(headers["Wechatpay-Timestamp"], headers["Wechatpay-Nonce"], body)
    key = load_public_key(sandbox.credentials["platform_public_key_pem"])
    assert headers["Wechatpay-Serial"] == serial
    assert verify(key, text, headers["Wechatpay-Signature"])
