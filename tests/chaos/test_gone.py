"""What Kassa needs is gone for a while: it says so clearly, is not ready, and recovers without a restart."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import tally
from chaos.house import Client, House, hurried, judge, under_load, until
from chaos.node import kill_family
from kassa.db import embedded
from kassa.ids import new_id

pytestmark = pytest.mark.long
"""Processes die here at chosen moments, for minutes in all; `make test` has the same promises in miniature in
flows/cli and conformance/journal."""


@pytest.fixture
def server() -> Iterator[embedded.Running]:
    """A PostgreSQL that this test may kill."""
    with embedded.temporary_directory("kassa-chaos-") as directory:
        running = embedded.start(directory)
        try:
            yield running
        finally:
            if (found := embedded.find(directory)) is not None:
                kill_family(found.pid)


@pytest.fixture
def own_house(tmp_path: Path, server: embedded.Running) -> Iterator[House]:
    """A Kassa on that server."""
    house = House(tmp_path / "kassa", server.dsn)
    try:
        house.start()
        yield house
    finally:
        house.stop()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    with embedded.temporary_directory("kassa-disk-") as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "tmpfs", directory], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)


def _fill(ballast: Path) -> None:
    """Until not one byte more fits."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 65_536)


async def _first_refusal(client: Client, wallet: str) -> httpx.Response:
    """The log has some room left in the file that is begun, so payments go on for a while."""
    for _ in range(400):
        body = {"order_id": new_id(), "amount": 5, "currency": "CNY", "channel": "wallet", "payer": {"wallet": wallet}}
        answers = await asyncio.gather(
            *(client.once("POST", "/v1/payments", body | {"order_id": new_id()}) for _ in range(50))
        )
        refused = [answer for answer in answers if answer.status_code != 201]
        if refused:
            return refused[0]
    raise AssertionError("the disk is not full")


async def test_the_database_is_killed_and_comes_back(own_house: House, server: embedded.Running) -> None:
    """Under load: unknown or refused meanwhile, never wrong; and all of it in the end."""
    house = own_house
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        async with under_load(client, wallet):
            await asyncio.sleep(0.5)
            tally.count("kills")
            kill_family(server.pid)
            order = {"order_id": new_id(), "amount": 5, "currency": "CNY", "channel": "wallet"}
            body, key = order | {"payer": {"wallet": wallet}}, new_id()
            meanwhile = asyncio.create_task(client.once("POST", "/v1/payments", body, key))

            await until(lambda: _is_ready(client, False), "not ready")
            _says_so(await meanwhile)
            await asyncio.to_thread(embedded.start, server.home)
            await until(lambda: _is_ready(client, True), "ready again")
            assert (await client.post("/v1/payments", body, key))["state"] == "succeeded"
        assert house.is_alive
        await judge(client)


async def test_everything_is_killed_at_once(whole_house: House) -> None:
    """API, workers, PostgreSQL with all its processes, and the provider: the same command again is all that is needed."""
    house = whole_house
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(10_000)
        async with under_load(client, wallet):
            await asyncio.sleep(1.0)
            house.kill_database()
            house.kill_sandbox()
            house.kill()
            await asyncio.to_thread(house.start)
            await asyncio.sleep(1.0)

            house.kill_database()
            await until(lambda: _is_ready(client, False), "not ready")
            await until(lambda: _is_ready(client, True), "ready by itself")
            await client.pay_from(wallet, 5)
        await judge(client)


@pytest.mark.needs("tmpfs")
async def test_the_disk_is_full_for_a_while(small_disk: Path) -> None:
    """PostgreSQL cannot write: refused or unknown, never wrong; and it goes on when there is room again."""
    house = House(small_disk / "kassa", None)
    try:
        house.start()
        async with house.shop() as client:
            await client.listen()
            wallet = await client.wallet(1_000_000)
            ballast = small_disk / "ballast"
            _fill(ballast)
            refused = await _first_refusal(client, wallet)
            _says_so(refused)
            await until(lambda: _is_ready(client, False), "not ready")
            for _ in range(20):
                assert await _is_ready(client, False), "ready although the disk is full"
                await asyncio.sleep(0.1)

            ballast.unlink()
            await until(lambda: _is_ready(client, True), "ready again")
            await client.pay_from(wallet, 5)
            await judge(client)
    finally:
        house.stop()


async def test_the_clock_steps_by_an_hour(house: House) -> None:
    """Forward and back, in the middle of payments. What is signed an hour off is refused on both sides, as it must be; it is
    sent and asked for again when the clock is right again. Money that needs no provider moves meanwhile."""
    async with house.shop() as client:
        await client.listen()
        wallet = await client.wallet(1000)
        for away, back in ((signal.SIGUSR1, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGUSR1)):
            payment = await client.order(100, expires_in_s=7200)
            house.signal(away)
            await client.pay_from(wallet, 5)
            await client.pay(payment)
            meanwhile = await client.order(100, expires_in_s=7200)
            assert await _is_ready(client, False)
            assert "3600 seconds apart" in (await client.http.get(house.api + "/readyz")).text
            house.signal(back)
            await until(lambda: _is_ready(client, True), "ready again")
            await _paid_at_last(client, payment)
            await _paid_at_last(client, meanwhile)
            await client.refund(payment, 40)
        await judge(client)
        assert await _is_ready(client, True)


async def test_orders_are_taken_while_the_provider_is_gone(house: House) -> None:
    """The attempt is not known or not sent; the same order goes through when the provider is back."""
    async with house.shop() as client:
        await client.listen()
        for _ in range(3):
            house.kill_sandbox()
            payment = await client.order(100)
            assert payment["state"] == "processing"
            assert payment["attempts"][0]["state"] in ("new", "unknown", "sending", "pending_payer")
            await _paid_at_last(client, payment)
        assert await _is_ready(client, True)
        await judge(client)


async def _is_ready(client: Client, wanted: bool) -> bool:
    answer = await client.http.get(client.house.told["api"] + "/readyz")
    assert answer.status_code in (200, 503)
    return (answer.status_code == 200) is wanted


def _says_so(answer: httpx.Response) -> None:
    """A problem that says what is true of the key."""
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] in ("system.busy", "system.unknown")
    assert problem["outcome"] in ("not_processed", "unknown")
    assert problem["retryable"] is True


async def _paid_at_last(client: Client, payment: dict[str, Any]) -> None:
    """Time passes until the provider has the order and the payer pays it."""
    async with hurried(client.house):
        await client.pay(payment)
        await client.until(f"/v1/payments/{payment['id']}", "succeeded")
