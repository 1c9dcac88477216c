"""The picture of `kassa queue watch` fits its terminal, and says what matters at each width."""

from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console

from kassa.cli.watch import Line, Picture, bars, document, lasting, picture
from kassa.messaging.activity import Flow
from kassa.messaging.queues import Queue

AT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
LONG = "relay:rabbitmq-2:kassa.events.batch.of.a.long.name"


def queue(name: str, **given: object) -> Queue:
    topic, _, group = name.partition(":")
    defaults: dict[str, object] = {
        "kind": "group", "topic": topic, "group": group, "brokers": ["rabbitmq"], "waiting": 0, "elsewhere": 0,
        "in_flight": 0, "delayed": 0, "retrying": 0, "dead": 0, "oldest_s": None, "paused": False,
    }  # fmt: skip
    return Queue(name=name, **(defaults | given))  # type: ignore[arg-type]


def lines() -> list[Line]:
    seen = Picture()
    found = [
        queue("payment_order:kassa", waiting=1_234_567, oldest_s=4000.0, dead=3, in_flight=100),
        queue(LONG, elsewhere=None, says="rabbitmq-2 does not answer (no answer in time)"),
        queue("shop.mails:mailer", paused=True, waiting=7),
    ]
    flows = {("payment_order", "kassa"): Flow(0, 900, 850.0, 2.0, 0, 0.0042, 1.5)}
    seen.lines([queue("payment_order:kassa", waiting=1_200_000)], flows, 0.0)
    return seen.lines(found, flows, 10.0)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_longer_than_the_terminal_and_nothing_that_matters_is_cut(width: int) -> None:
    console = Console(file=StringIO(), width=width, highlight=False, markup=False, legacy_windows=False)

    console.print(picture(lines(), AT, width, {"kassa.events": 850.0}))

    assert isinstance(console.file, StringIO)
    page = console.file.getvalue()
    assert all(len(line) <= width for line in page.splitlines())
    for word in ("1,234,567", "850", "4.2 ms", "1.5 s", "1 h", "paused", "rabbitmq-2 does not answer", "+?"):
        assert word in page, (word, page)
    # Both ends of a name that does not fit.
    assert "relay:" in page and "name" in page
    assert ("failed/s" in page) is (width >= 130)


def test_growth_is_what_was_added_while_we_looked() -> None:
    (first, *_) = lines()

    assert first.growth == pytest.approx(3456.7)


def test_programs_get_the_same_figures() -> None:
    (first, second, _) = document(lines(), AT)["data"]

    assert (first["length"], first["handled_per_s"], first["p50_s"], first["dead"]) == (1_234_567, 850.0, 0.0042, 3)
    assert second["says"].startswith("rabbitmq-2")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "–"),
        (0.0012, "1.2 ms"),
        (0.2, "200 ms"),
        (59.0, "59.0 s"),
        (90.0, "2 min"),
        (7200.0, "2 h"),
        (9e5, "10 d"),
    ],
)
def test_times_are_short(seconds: float | None, said: str) -> None:
    assert lasting(seconds) == said


def test_bars_are_as_high_as_their_rates() -> None:
    assert bars([0, 4, 8]) == "▁▅█"
    assert bars([0, 0]) == "▁▁"
