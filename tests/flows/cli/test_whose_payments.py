"""Nobody can say whose payments come over the queue: doctor finds it, and whoever starts a consumer is told."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flows.api.support import House, running
from flows.cli.house import ANSWER_S, PROGRAM, environment, kassa, wait_until
from kassa.cli.node import api_of
from kassa.workers import loops

MEND = "Set KASSA_ORDER_MERCHANT"
PART = "queue payment_order"


@pytest.fixture
def place(tmp_path: Path, database_url: str) -> tuple[str, ...]:
    """A set-up whose broker carries the queue."""
    key = tmp_path / "secrets.key"
    key.write_bytes(base64.b64encode(b"k" * 32))
    key.chmod(0o600)
    write(tmp_path)
    return "--dir", str(tmp_path), "--database-url", database_url


def write(directory: Path, brokers: str = "postgres", more: str = "") -> None:
    (directory / "kassa.toml").write_text(f'brokers = ["{brokers}"]\nsecrets_key_file = "secrets.key"\n{more}')


def test_doctor_says_that_requests_wait_and_how_to_mend_it(
    tmp_path: Path, database_url: str, place: tuple[str, ...]
) -> None:
    def found() -> Any:
        # The tests' server has fsync off, which doctor never forgives.
        checks = json.loads(kassa("doctor", "--json", *place, expect=1).stdout)["checks"]
        return next((one for one in checks if one["part"] == PART), None)

    name = json.loads(kassa("merchant", "create", "First", "--json", *place).stdout)["id"]
    kassa("merchant", "create", "Second", *place)
    unset = found()
    write(tmp_path, brokers="postgres#kassa.events")
    not_carried = found()
    write(tmp_path, more='order_merchant = "mch_1"')
    wrong = found()
    write(tmp_path, more=f'order_merchant = "{name}"')
    right = found()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE merchant SET state = 'suspended' WHERE name = 'First'")
    suspended = found()

    assert (unset["level"], wrong["level"], suspended["level"]) == ("warning", "failure", "failure")
    assert "more than one merchant" in unset["says"]
    assert "mch_1" in wrong["says"]
    assert f"{name}, is suspended" in suspended["says"]
    assert all(one["do"].startswith(MEND) for one in (unset, wrong, suspended))
    assert not_carried is None
    assert right == {"part": PART, "level": "ok", "says": f"It makes payments of {name}.", "do": ""}


async def test_whoever_starts_workers_beside_the_api_is_told(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(database_url, brokers=("postgres",)) as house:
        await house.shop("First")
        assert await said_at_start(house, capsys) == ""
        await house.shop("Second")
        assert "! There is more than one merchant" in (said := await said_at_start(house, capsys)) and MEND in said
        assert await said_at_start(house, capsys, workers=("relay",)) == ""


async def said_at_start(
    house: House, capsys: pytest.CaptureFixture[str], workers: tuple[str, ...] = loops.NAMES
) -> str:
    """What people are told when one more process with these workers starts; port and loops are those of the house."""
    capsys.readouterr()
    await house.api.stop()
    async with api_of(house.app, workers):
        pass
    await house.api.start()
    return capsys.readouterr().err


def test_a_worker_says_at_its_start_that_requests_wait(tmp_path: Path, place: tuple[str, ...]) -> None:
    for name in ("First", "Second"):
        kassa("merchant", "create", name, *place)
    errors = tmp_path / "stderr"

    with errors.open("wb") as file:
        worker = subprocess.Popen([*PROGRAM, "worker", "orders", *place], stderr=file, env=environment())
    try:
        wait_until(lambda: "orders.wait" in errors.read_text())
    finally:
        worker.terminate()
        assert worker.wait(timeout=ANSWER_S) == 0

    said = errors.read_text().splitlines()
    assert any(line.startswith("! There is more than one merchant") for line in said)
    logged = json.loads(next(line for line in said if "orders.wait" in line))
    assert (logged["level"], logged["setting"]) == ("warning", "order_merchant")
    assert logged["do"].startswith(MEND)
