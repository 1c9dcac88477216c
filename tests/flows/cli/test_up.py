"""`kassa up` for real: a payment through it, a kill of everything, and on it goes."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flows.cli.house import ANSWER_S, PROGRAM, Up, environment, sandbox_pid, set_up, wait_until
from kassa.cli.sandboxes import is_alive
from kassa.db import embedded


@pytest.fixture
def directory() -> Iterator[Path]:
    with set_up() as place:
        yield place


def test_a_payment_survives_a_kill_of_everything(directory: Path) -> None:
    first = Up(directory)
    paid = first.waiting("1", 100, description="Two coffees")
    assert paid.state == "processing"
    first.pay(paid)
    with first.client() as client:
        wait_until(lambda: client.payments.get(paid.id).state == "succeeded")
    waiting = first.waiting("2", 250)

    first.kill()
    server = embedded.find(directory)
    assert server is not None, "PostgreSQL is a process of its own"
    os.kill(server.pid, signal.SIGKILL)
    os.kill(sandbox_pid(directory), signal.SIGKILL)
    wait_until(lambda: not is_alive(server.pid))

    second = Up(directory)
    assert second.said["api"] == first.said["api"]
    assert second.said["api_key"] == first.said["api_key"]
    assert second.said["merchant"] == first.said["merchant"]
    assert second.sandbox == first.sandbox
    with second.client() as client:
        assert client.payments.get(paid.id).state == "succeeded"
        second.pay(waiting)
        wait_until(lambda: client.payments.get(waiting.id).state == "succeeded")
        [balance] = client.balances.get()
        assert balance.balance == 350
    code, rest = second.stop()

    assert (code, rest) == (0, b"")
    assert embedded.find(directory) is None
    assert not (directory / "sandboxes" / "wechat.json").exists(), "the sandbox was stopped and its record taken away"


def test_what_survived_is_adopted_and_what_died_meanwhile_is_started_again(directory: Path) -> None:
    first = Up(directory)
    server, sandbox = embedded.find(directory), sandbox_pid(directory)
    assert server is not None
    first.kill()

    second = Up(directory)
    again = embedded.find(directory)
    assert again is not None
    assert again.pid == server.pid
    assert sandbox_pid(directory) == sandbox

    os.kill(again.pid, signal.SIGKILL)
    os.kill(sandbox, signal.SIGKILL)
    wait_until(lambda: sandbox_pid(directory) != sandbox)

    def is_ready() -> bool:
        try:
            return httpx.get(f"{second.said['api']}/readyz", trust_env=False, timeout=ANSWER_S).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(is_ready)
    payment = second.waiting("1")
    second.pay(payment)
    with second.client() as client:
        wait_until(lambda: client.payments.get(payment.id).state == "succeeded")
    assert second.stop(signal.SIGINT) == (0, b"")


def test_a_start_that_is_killed_is_no_hindrance(directory: Path) -> None:
    for delay_s in (0.4, 0.9, 1.6):
        begun = subprocess.Popen(
            [*PROGRAM, "up", "--dir", str(directory), "--port", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        time.sleep(delay_s)
        begun.kill()
        begun.wait()

    run = Up(directory)

    assert run.waiting("1").state == "processing"
    assert run.stop() == (0, b"")


def test_a_database_of_ones_own_is_remembered(directory: Path, empty_database_url: str) -> None:
    first = Up(directory, "--port", "0", "--database-url", empty_database_url)
    assert first.said["database"] == empty_database_url
    with first.client() as client:
        wallet = client.wallets.create(user="u-1", currency="CNY")
    first.kill()

    second = Up(directory)
    with second.client() as client:
        assert client.wallets.get(wallet.id).user == "u-1"
    assert second.said["database"] == empty_database_url
    assert second.stop() == (0, b"")
    assert not (directory / "postgres").exists()
