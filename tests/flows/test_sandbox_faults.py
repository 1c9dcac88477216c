"""Faults on demand: each does what it says, once per `times`, and the books tell what really happened."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest

from flows.wechat_sandbox import PATIENCE_S, Received, SandboxProcess, Shop, new_number, wait_until
from kassa.channels.sandbox.faults import OPERATIONS, Fault
from kassa.channels.wechat_crypto import decrypt_resource, load_public_key, response_text, verify


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    process = SandboxProcess(tmp_path_factory.mktemp("wechat"))
    yield process
    process.stop()


@pytest.fixture
def sandbox(running: SandboxProcess) -> SandboxProcess:
    running.door("DELETE", "/faults")
    running.settings(refund_gap_s=0, refund_delay_ms=20, signtest_every=0, callback_speed=200.0)
    return running


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    server = shop.serve()
    yield shop
    server.shutdown()
    server.server_close()


def is_signed(sandbox: SandboxProcess, message: httpx.Response | Received) -> bool:
    """By the bare platform key."""
    body = message.content if isinstance(message, httpx.Response) else message.body
    text = response_text(message.headers["wechatpay-timestamp"], message.headers["wechatpay-nonce"], body)
    key = load_public_key(sandbox.credentials["platform_public_key_pem"])
    return verify(key, text, message.headers["wechatpay-signature"])


def total(sandbox: SandboxProcess, callback: Received) -> int:
    resource = json.loads(callback.body)["resource"]
    opened = decrypt_resource(
        sandbox.credentials["apiv3_key"].encode(),
        nonce=resource["nonce"],
        associated_data=resource["associated_data"],
        ciphertext=resource["ciphertext"],
    )
    amount: int = json.loads(opened)["amount"]["total"]
    return amount


# On requests: each operation, and how the books show that it was processed

Act = Callable[[SandboxProcess, str], httpx.Response]
ACTS: dict[str, tuple[Act, Callable[[SandboxProcess, str], bool]]] = {
    "create": (lambda sandbox, number: sandbox.create(number), lambda sandbox, number: bool(sandbox.charge(number))),
    "close": (
        lambda sandbox, number: sandbox.close(number),
        lambda sandbox, number: (sandbox.charge(number) or {})["state"] == "CLOSED",
    ),
    "refund": (
        lambda sandbox, number: sandbox.refund(number, number),
        lambda sandbox, number: bool(sandbox.door("GET", f"/books?out_trade_no={number}")["refunds"]),
    ),
}


def prepared(sandbox: SandboxProcess, on: str) -> str:
    """A number for which the operation is possible."""
    if on == "create":
        return new_number()
    if on == "refund":
        return sandbox.paid()
    number = new_number()
    assert sandbox.create(number).status_code == 200
    return number


@pytest.mark.parametrize("on", ACTS)
def test_drop_before_closes_the_connection_and_does_nothing(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "drop_before")

    with pytest.raises(httpx.RemoteProtocolError):
        act(sandbox, number)

    assert not is_processed(sandbox, number)
    assert act(sandbox, number).is_success


@pytest.mark.parametrize("on", ACTS)
def test_drop_after_processes_and_loses_the_answer(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "drop_after")

    with pytest.raises(httpx.RemoteProtocolError):
        act(sandbox, number)

    assert is_processed(sandbox, number)
    assert act(sandbox, number).is_success


@pytest.mark.parametrize("on", ACTS)
@pytest.mark.parametrize(
    ("fault", "status", "code"), [("status_5xx", 500, "SYSTEM_ERROR"), ("status_429", 429, "FREQUENCY_LIMITED")]
)
def test_a_gateway_error_is_unsigned_and_does_nothing(
    sandbox: SandboxProcess, on: str, fault: str, status: int, code: str
) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, fault)

    answer = act(sandbox, number)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "wechatpay-signature" not in answer.headers
    assert not is_processed(sandbox, number)


@pytest.mark.parametrize("on", ACTS)
def test_garbage_is_signed_but_is_not_json(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "garbage")

    answer = act(sandbox, number)

    assert answer.status_code == 200
    assert is_signed(sandbox, answer)
    with pytest.raises(ValueError, match="decode"):
        json.loads(answer.content)
    assert is_processed(sandbox, number)


@pytest.mark.parametrize("on", ACTS)
def test_a_bad_signature_is_a_signature_of_something_else(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "bad_signature")

    answer = act(sandbox, number)

    assert answer.is_success
    assert not is_signed(sandbox, answer)
    assert is_processed(sandbox, number)


@pytest.mark.parametrize("on", ACTS)
def test_delay_processes_now_and_late_processes_then(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    for fault, happened_already in (("delay", True), ("late", False)):
        number = prepared(sandbox, on)
        sandbox.fault(on, fault, delay_ms=2500)
        started = time.monotonic()
        answers: list[httpx.Response] = []
        caller = threading.Thread(target=lambda number=number, answers=answers: answers.append(act(sandbox, number)))

        caller.start()
        wait_until(lambda: not sandbox.door("GET", "/faults")["faults"])
        if happened_already:
            wait_until(partial(is_processed, sandbox, number))
            assert answers == []
        else:
            assert not is_processed(sandbox, number)
        caller.join(PATIENCE_S)

        assert time.monotonic() - started >= 2.5
        assert answers[0].is_success
        assert is_processed(sandbox, number)


def test_late_is_processed_although_the_caller_has_left(sandbox: SandboxProcess) -> None:
    """The nastiest of all: a query right after the time-out says that there is no such order."""
    number = new_number()
    sandbox.fault("create", "late", delay_ms=4000)

    with pytest.raises(httpx.ReadTimeout):
        sandbox.call("POST", "/v3/pay/transactions/native", sandbox.order(number), timeout_s=1.0)
    assert sandbox.query(number).status_code == 404

    wait_until(lambda: sandbox.query(number).status_code == 200)


@pytest.mark.parametrize("on", ACTS)
def test_duplicate_is_processed_twice_with_one_effect(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "duplicate")

    assert act(sandbox, number).is_success
    assert is_processed(sandbox, number)
    assert len(sandbox.door("GET", f"/books?out_trade_no={number}")["refunds"]) == (1 if on == "refund" else 0)


@pytest.mark.parametrize("on", ACTS)
def test_missing_never_answers_and_does_nothing(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "missing", delay_ms=200)

    with pytest.raises(httpx.RemoteProtocolError):
        act(sandbox, number)

    assert not is_processed(sandbox, number)


@pytest.mark.parametrize("on", ACTS)
def test_reorder_lets_the_next_request_go_first(sandbox: SandboxProcess, on: str) -> None:
    act, is_processed = ACTS[on]
    number = prepared(sandbox, on)
    sandbox.fault(on, "reorder", delay_ms=10_000)
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(act(sandbox, number)))

    caller.start()
    wait_until(lambda: not sandbox.door("GET", "/faults")["faults"])
    assert not is_processed(sandbox, number)
    assert sandbox.create(new_number()).status_code == 200
    caller.join(PATIENCE_S)

    assert answers[0].is_success
    assert is_processed(sandbox, number)


def test_a_wrong_amount_is_one_too_much(sandbox: SandboxProcess) -> None:
    """On create it is in the order itself; elsewhere the answer lies and the books are right."""
    wrong = new_number()
    sandbox.fault("create", "wrong_amount")
    sandbox.create(wrong)
    assert sandbox.query(wrong).json()["amount"]["total"] == 101

    number = sandbox.paid()
    for on in ("query", "refund", "refund_query"):
        sandbox.fault(on, "wrong_amount")
    assert sandbox.query(number).json()["amount"]["total"] == 101
    assert sandbox.query(number).json()["amount"]["total"] == 100
    assert sandbox.refund(number, number).json()["amount"]["refund"] == 31
    assert sandbox.refund_query(number).json()["amount"]["refund"] == 31
    assert sandbox.refund_query(number).json()["amount"]["refund"] == 30


@pytest.mark.parametrize("on", ["query", "refund_query"])
def test_reading_can_fail_in_every_way_too(sandbox: SandboxProcess, on: str) -> None:
    number = sandbox.paid()
    sandbox.refund(number, number)
    act = sandbox.query if on == "query" else sandbox.refund_query

    for fault in ("drop_before", "drop_after", "missing"):
        sandbox.fault(on, fault, delay_ms=50)
        with pytest.raises(httpx.RemoteProtocolError):
            act(number)
    for fault, status in (("status_5xx", 500), ("status_429", 429), ("delay", 200), ("late", 200), ("duplicate", 200)):
        sandbox.fault(on, fault, delay_ms=50)
        assert act(number).status_code == status
    sandbox.fault(on, "bad_signature")
    assert not is_signed(sandbox, act(number))


def test_a_fault_happens_as_often_as_it_says_and_can_be_taken_back(sandbox: SandboxProcess) -> None:
    sandbox.fault("query", "status_5xx", times=2)
    statuses = [sandbox.query("n" * 20).status_code for _ in range(3)]
    sandbox.fault("query", "status_5xx", times=5)

    assert statuses == [500, 500, 404]
    assert sandbox.door("DELETE", "/faults") == {"cleared": 1}
    assert sandbox.query("n" * 20).status_code == 404


def test_every_fault_can_be_armed_on_every_operation(sandbox: SandboxProcess) -> None:
    for on in OPERATIONS:
        for fault in Fault:
            assert sandbox.fault(on, fault.value)["effect"]

    assert len(sandbox.door("GET", "/faults")["faults"]) == len(OPERATIONS) * len(Fault)


@pytest.mark.parametrize(
    "asked",
    [
        {"on": "lunch", "fault": "delay"},
        {"on": "create", "fault": "fire"},
        {"on": "create", "fault": "delay", "times": 0},
        {"on": "create", "fault": "delay", "delay_ms": "soon"},
        {"on": "create", "fault": "delay", "tmies": 2},
        {},
    ],
)
def test_a_fault_that_is_not_known_is_refused(sandbox: SandboxProcess, asked: dict[str, object]) -> None:
    answer = sandbox.client.post("/_sandbox/faults", json=asked)

    assert answer.status_code == 400
    assert answer.json()["error"]


# On callbacks


def paid_and_called_back(sandbox: SandboxProcess, shop: Shop, fault: str | None = None, **more: int) -> str:
    if fault is not None:
        sandbox.fault("callback", fault, **more)
    return sandbox.paid(notify_url=shop.url)


def is_taken(sandbox: SandboxProcess, number: str) -> bool:
    return all(callback["state"] == "taken" for callback in sandbox.callbacks(number))


def test_a_callback_is_sent_until_it_is_taken(sandbox: SandboxProcess, shop: Shop) -> None:
    shop.status = 500
    number = paid_and_called_back(sandbox, shop)
    shop.wait_for(3)

    shop.status = 204
    wait_until(lambda: is_taken(sandbox, number))

    assert all(is_signed(sandbox, callback) for callback in shop.received)
    assert len({json.loads(callback.body)["id"] for callback in shop.received}) == 1


@pytest.mark.parametrize("fault", ["drop_before", "drop_after", "status_5xx", "status_429"])
def test_a_callback_that_was_lost_is_sent_again(sandbox: SandboxProcess, shop: Shop, fault: str) -> None:
    number = paid_and_called_back(sandbox, shop, fault)

    wait_until(lambda: is_taken(sandbox, number))

    wait_until(lambda: len(shop.received) == (1 if fault == "drop_before" else 2))
    [callback] = sandbox.callbacks(number)
    assert [try_["what"] for try_ in callback["deliveries"]] == [fault, "callback"]


def test_a_garbled_or_forged_callback_is_sent_again_as_it_should_be(sandbox: SandboxProcess, shop: Shop) -> None:
    paid_and_called_back(sandbox, shop, "bad_signature")
    forged, right = shop.wait_for(2)[:2]
    assert (is_signed(sandbox, forged), is_signed(sandbox, right)) == (False, True)

    shop.received.clear()
    paid_and_called_back(sandbox, shop, "garbage")
    garbled, right = shop.wait_for(2)[:2]
    assert is_signed(sandbox, garbled)
    assert not garbled.body.startswith(b"{")
    assert total(sandbox, right) == 100


def test_a_duplicate_callback_comes_twice(sandbox: SandboxProcess, shop: Shop) -> None:
    paid_and_called_back(sandbox, shop, "duplicate")

    first, second = shop.wait_for(2)

    assert json.loads(first.body)["id"] == json.loads(second.body)["id"]


@pytest.mark.parametrize("fault", ["delay", "late"])
def test_a_callback_can_come_late(sandbox: SandboxProcess, shop: Shop, fault: str) -> None:
    started = time.monotonic()
    paid_and_called_back(sandbox, shop, fault, delay_ms=400)

    shop.wait_for(1)

    assert time.monotonic() - started >= 0.4


def test_a_missing_callback_never_comes(sandbox: SandboxProcess, shop: Shop) -> None:
    number = paid_and_called_back(sandbox, shop, "missing")

    wait_until(lambda: [callback["state"] for callback in sandbox.callbacks(number)] == ["missing"])
    paid_and_called_back(sandbox, shop)
    shop.wait_for(1)

    assert len(shop.received) == 1
    assert sandbox.query(number).json()["trade_state"] == "SUCCESS"


def test_reordered_callbacks_swap_places(sandbox: SandboxProcess, shop: Shop) -> None:
    held = paid_and_called_back(sandbox, shop, "reorder", delay_ms=10_000)
    wait_until(lambda: not sandbox.door("GET", "/faults")["faults"])
    first = paid_and_called_back(sandbox, shop)

    shop.wait_for(2)

    wait_until(lambda: is_taken(sandbox, held) and is_taken(sandbox, first))
    tries = {number: sandbox.callbacks(number)[0]["deliveries"][0]["at"] for number in (held, first)}
    assert tries[first] < tries[held]


def test_a_callback_can_lie_about_its_amount(sandbox: SandboxProcess, shop: Shop) -> None:
    number = paid_and_called_back(sandbox, shop, "wrong_amount")

    [callback] = shop.wait_for(1)

    assert total(sandbox, callback) == 101
    assert sandbox.query(number).json()["amount"]["total"] == 100


def test_a_probe_comes_before_a_callback_and_must_be_refused(sandbox: SandboxProcess, shop: Shop) -> None:
    sandbox.settings(signtest_every=1)
    number = paid_and_called_back(sandbox, shop)

    probe, callback = shop.wait_for(2)

    assert probe.is_probe
    assert not is_signed(sandbox, probe)
    assert is_signed(sandbox, callback)
    wait_until(lambda: is_taken(sandbox, number))
    [shown] = sandbox.callbacks(number)
    assert [try_["what"] for try_ in shown["deliveries"]] == ["probe", "callback"]
