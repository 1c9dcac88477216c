"""`kassa bench brokers` from the command line to the page, with real servers that are really killed."""

import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from flows.cli.house import kassa
from kassa.bench.removal import remove
from kassa.bench.stage import GROUP, Stage
from kassa.db.pool import connect, open_pool
from kassa.messaging.binders import amqp
from kassa.messaging.binders.rabbitmq import queues_of
from kassa.messaging.wake import Wakeups
from servers import Kafka, RabbitMQ
from unit.bench.test_page import OUTSIDE

PROGRAM = [sys.executable, "-m", "kassa.cli.main", "bench", "brokers"]


def bench(page: Path, *options: str, expect: int = 0) -> dict[str, Any]:
    """The document; the page is written."""
    command = [*PROGRAM, "--quick", "--seconds", "0.2", "--json", "--out", str(page), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert json.loads(page.with_suffix(".json").read_text()) == document
    return document


def figures(document: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one for one in document["brokers"]}


def test_every_broker_is_measured_and_nothing_is_lost_by_kills(tmp_path: Path, rabbitmq: RabbitMQ) -> None:
    """PostgreSQL and the ZeroMQ hub are killed by the command itself, RabbitMQ is not: nobody said that it may be."""
    page = tmp_path / "page.html"

    found = figures(
        document := bench(
            page, "--broker", "postgres", "--broker", "zeromq", "--broker", rabbitmq.url, "--runs", "rabbitmq"
        )
    )

    assert list(found) == ["postgres", "zeromq", "rabbitmq"]
    for one in found.values():
        assert {each["batch"] for each in one["throughput"]} == {10, 100}
        assert all(each["send_per_s"] > 0 and each["receive_per_s"] > 0 for each in one["throughput"])
        assert {each["asked_per_s"] for each in one["latency"]} >= {100.0, 200.0}
        assert all(each["samples"] > 0 and each["p50_ms"] > 0 for each in one["latency"])
        assert one["memory"]["client"] > 0 and one["left_behind"] == []
    for name in ("postgres", "zeromq"):
        fault = found[name]["recovery"]
        assert fault["confirmed"] == fault["handled"] == fault["sent"] > 0
        assert (fault["lost"], fault["out_of_order"]) == (0, 0)
        assert fault["caught_up_s"] > fault["pause_s"]
        assert any(handled == 0 for at, _, handled in fault["timeline"] if 0 < at < fault["started_s"])
    assert found["rabbitmq"]["recovery"] is None
    (gap,) = [one for one in found["rabbitmq"]["gaps"] if one["what"] == "kill -9"]
    assert "--kill-command rabbitmq=" in gap["fix"]
    assert rabbitmq.password not in page.read_text() + json.dumps(document)
    assert not OUTSIDE.search(page.read_text())
    assert document["recommendation"]["headline"] in page.read_text()
    # Where it stops being true.
    assert document["limits"] and all(escape(limit) in page.read_text() for limit in document["limits"])


@pytest.mark.needs("rabbitmq")
def test_a_server_is_killed_and_started_by_commands(tmp_path: Path, servers_directory: Path) -> None:
    """A RabbitMQ of its own, as other tests use the shared one."""
    server = RabbitMQ(servers_directory / "bench", outlives_us=True).start()
    try:
        code = (
            "import sys; from pathlib import Path; from servers import RabbitMQ; "
            "getattr(RabbitMQ(Path(sys.argv[1]), outlives_us=True), sys.argv[2])()"
        )
        kill, start = (
            shlex.join([sys.executable, "-c", code, str(server.directory), verb]) for verb in ("kill", "start")
        )

        document = bench(
            tmp_path / "page.html", "--broker", server.url, "--kill-command", f"{server.url}={kill}",
            "--start-command", f"rabbitmq={start}",
        )  # fmt: skip

        fault = figures(document)["rabbitmq"]["recovery"]
        assert fault["confirmed"] == fault["handled"] == fault["sent"] > 0
        assert (fault["lost"], fault["out_of_order"]) == (0, 0)
        assert fault["started_s"] > fault["pause_s"]
        assert str(server.directory) not in (tmp_path / "page.html").read_text()
    finally:
        RabbitMQ(server.directory).kill()


@pytest.mark.needs("kafka")
def test_kafka_is_measured(tmp_path: Path, kafka: Kafka, empty_database_url: str) -> None:
    options = ("--broker", kafka.url, "--no-kill", "--database-url", empty_database_url)
    (one,) = bench(tmp_path / "page.html", *options)["brokers"]

    assert {each["batch"] for each in one["throughput"]} == {10, 100}
    assert all(each["send_per_s"] > 0 and each["receive_per_s"] > 0 for each in one["throughput"])
    assert all(each["samples"] > 0 and each["p50_ms"] > 0 for each in one["latency"])
    assert one["left_behind"] == []


def test_a_broker_that_is_away_leaves_the_others(tmp_path: Path) -> None:
    found = figures(
        bench(tmp_path / "page.html", "--broker", "amqp://127.0.0.1:1", "--broker", "postgres", "--no-kill")
    )

    (gap,) = found["rabbitmq"]["gaps"]
    assert gap["what"] == "everything" and "Start the server" in gap["fix"]
    assert found["postgres"]["throughput"] and found["postgres"]["recovery"] is None


def test_a_database_of_the_users_is_left_as_it_was(tmp_path: Path, empty_database_url: str) -> None:
    async def databases() -> tuple[set[str], int]:
        connection = await asyncpg.connect(empty_database_url)
        try:
            names = {row["datname"] for row in await connection.fetch("SELECT datname FROM pg_database")}
            tables = await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
            return {name for name in names if name.startswith("kassa_bench")}, tables
        finally:
            await connection.close()

    document = bench(tmp_path / "page.html", "--broker", "postgres", "--database-url", empty_database_url)

    (one,) = document["brokers"]
    assert one["throughput"] and one["recovery"] is None
    assert any(gap["what"] == "kill -9" for gap in one["gaps"])
    assert asyncio.run(databases()) == (set(), 0)


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [*PROGRAM, "--out", str(page), "--json", "--seconds", "0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "batches of 100" in line:
                break
        running.send_signal(signal.SIGINT)
        said, told = running.communicate()
    document = json.loads(said)

    assert running.returncode == 0, told
    assert document["is_complete"] is False
    first, second = document["brokers"]
    assert {one["batch"] for one in first["throughput"]} >= {1, 10}
    assert first["gaps"] and second["gaps"][0]["what"] == "everything"
    assert "The run was interrupted" in page.read_text()


def test_what_was_made_at_rabbitmq_is_gone_afterwards(rabbitmq_url: str, database_url: str) -> None:
    async def life() -> None:
        pool = await open_pool(database_url, application="test")
        stage = Stage(rabbitmq_url, pool, Wakeups(lambda: connect(database_url, application="test wake")))
        await stage.binder.open()
        line = await stage.line("pace")
        queues = queues_of(line.topic, GROUP)
        made = list(stage.made)
        assert [await _exists(rabbitmq_url, name) for name in queues] == [True] * len(queues)
        await stage.close()

        assert await remove("rabbitmq", rabbitmq_url, made) == []

        assert [await _exists(rabbitmq_url, name) for name in queues] == [False] * len(queues)
        await pool.close()

    asyncio.run(life())


@pytest.fixture
def rabbitmq_url(rabbitmq: RabbitMQ) -> str:
    return rabbitmq.url


async def _exists(url: str, queue: str) -> bool:
    import aiormq.exceptions

    link = amqp.Link(amqp.read_url(url), "test")
    try:
        live = await link.live()
        await amqp.ask(live, lambda channel: channel.queue_declare(queue, passive=True))
    except aiormq.exceptions.ChannelNotFoundEntity:
        return False
    finally:
        await link.close()
    return True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kill-command", "kafka=x"], "--kill-command wants NAME=…, where NAME is one of postgres, zeromq"),
        (["--server-pid", "postgres=x"], "'x' is no number"),
        (["--broker", "memory"], "memory is no broker"),
        (["--runs", "pigeons"], "--runs knows postgres"),
    ],
)  # fmt: skip
def test_wrong_options_are_told(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    done = kassa("bench", "brokers", *options, expect=2)

    assert words in re.sub(r"\s+", " ", done.stderr)
