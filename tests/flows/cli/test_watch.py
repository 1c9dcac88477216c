"""`kassa queue watch` as people and programs have it: a process that looks again and again at a running system, until Ctrl-C."""

import json
import os
import re
import select
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from flows.cli.house import ANSWER_S, PROGRAM, Up, environment, kassa, set_up, wait_until

QUEUE = "payment_order:kassa"
SEEN_S = 120.0
"""For what is awaited to be seen: on a busy machine everything may stand still for many seconds."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
TITLE = re.compile(r"(\d\d:\d\d:\d\d) UTC +[\d,]+ waiting +(\S+) done/s")
WHOLE_SCREEN, GIVEN_BACK = "\x1b[?1049h", "\x1b[?1049l"


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """With requests that pass all the time."""
    with set_up() as directory:
        run = Up(directory, "--port", "0", "--broker", "postgres")
        over = threading.Event()
        passing = threading.Thread(target=send_requests, args=(run.said["database"], over))
        passing.start()
        try:
            yield run
        finally:
            over.set()
            passing.join()
        assert run.stop()[0] == 0


def send_requests(database_url: str, over: threading.Event) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        number = 0
        while not over.wait(0.1):
            number += 1
            body = json.dumps({"order_id": f"watched-{number}", "amount": 100})
            connection.execute("SELECT kassa_send('payment_order', %s)", (body,))


class Terminal:
    """A terminal with `kassa queue watch` on it."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 160))
        given = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*PROGRAM, "queue", "watch", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=given | {"TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)
        self._raw = b""

    @property
    def raw(self) -> str:
        """All that was written to it."""
        return self._raw.decode(errors="replace")

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.raw)

    def read(self) -> bool:
        """What is written next; False: nothing more comes."""
        if not select.select([self._ours], [], [], 1.0)[0]:
            return self.process.poll() is None
        try:
            more = os.read(self._ours, 65_536)
        except OSError:
            # Linux says so when nobody has the other side any more.
            return False
        self._raw += more
        return bool(more)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_live_view_is_drawn_again_and_ends_with_ctrl_c(up: Up) -> None:
    terminal = Terminal("--dir", str(up.said["dir"]))
    try:
        deadline = time.monotonic() + SEEN_S
        while len(times_of_moving(terminal.text)) < 2 or QUEUE not in terminal.text:
            assert time.monotonic() < deadline and terminal.read(), terminal.text
        terminal.process.send_signal(signal.SIGINT)
        while terminal.read():
            assert time.monotonic() < deadline, terminal.text

        assert terminal.process.wait(timeout=ANSWER_S) == 0
        assert terminal.raw.count(WHOLE_SCREEN) == 1 and GIVEN_BACK in terminal.raw.rpartition(WHOLE_SCREEN)[2]
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()


def times_of_moving(text: str) -> set[str]:
    """When it was drawn with something passing."""
    return {at for at, rate in TITLE.findall(text) if rate.strip("0.")}


def test_programs_get_one_document_a_second_until_ctrl_c(up: Up) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "queue", "watch", "--json", "--dir", str(up.said["dir"])], stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        seen: list[Any] = []
        deadline = time.monotonic() + SEEN_S
        while len(moving := [line_of(one) for one in seen if line_of(one)["handled_per_s"] > 0]) < 2:
            assert time.monotonic() < deadline, seen
            seen.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=ANSWER_S)

        assert process.returncode == 0
        seen += [json.loads(line) for line in rest.splitlines()]
        assert [one["at"] for one in seen] == sorted({one["at"] for one in seen})
        assert all(one["p99_s"] > 0 for one in moving)
    finally:
        process.kill()
        process.wait()


def test_who_asks_over_http_once_gets_what_watch_shows(up: Up) -> None:
    key = json.loads(kassa("key", "create", "--operator", "--dir", str(up.said["dir"]), "--json").stdout)["key"]

    def moving() -> Any:
        found = up.get("/v1/queues", key).json()
        return line_of(found) if line_of(found)["handled_per_s"] else None

    listed = wait_until(moving)
    peeked = up.get(f"/v1/queues/{QUEUE}", key).json()["queue"]

    for queue in (listed, peeked):
        # Ten requests a second are sent.
        assert 0 < queue["handled_per_s"] < 100 and 0 < queue["received_per_s"] < 100
        assert (queue["retried_per_s"], queue["given_up_per_s"]) == (0, 0)
        assert 0 < queue["p50_s"] <= queue["p99_s"]


def test_a_queue_of_which_no_process_tells_has_no_figures(up: Up) -> None:
    place = ["--dir", str(up.said["dir"])]
    key = json.loads(kassa("key", "create", "--operator", *place, "--json").stdout)["key"]
    kassa("queue", "subscribe", "payment_order", "nobody", *place)

    queue = up.get("/v1/queues/payment_order:nobody", key).json()["queue"]

    figures = ("handled_per_s", "received_per_s", "retried_per_s", "given_up_per_s", "p50_s", "p99_s")
    assert [queue[name] for name in figures] == [None] * 6


def line_of(document: Any) -> Any:
    (line,) = [one for one in document["data"] if one["name"] == QUEUE]
    return line
