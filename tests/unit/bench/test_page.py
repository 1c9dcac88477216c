"""The page and its charts: self-contained, well-formed, and with every figure of the document in it."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest

from kassa.bench import charts
from kassa.bench.measure import percentile
from kassa.bench.model import Gap, Measured, Memory, Moment, Needs, Recovery, Report
from kassa.bench.needs import recommend
from kassa.bench.page import rendered
from unit.bench.test_needs import broker, latency, recovery, throughput

OUTSIDE = re.compile(r"""(?:src|href|action)\s*=|url\(|@import|https?://|<script|<link|<iframe""", re.IGNORECASE)
"""What would make a browser fetch something, or take anybody elsewhere."""


def report(*brokers: Measured, **changes: object) -> Report:
    needs = Needs()
    whole = Report(
        at="2026-11-25T12:00:00+00:00", took_s=60, seconds=1, is_quick=False, is_complete=True, body_bytes=300,
        machine={"processor": "some", "cores": 2, "memory_bytes": 2**34, "system": "Linux", "python": "3.11"},
        load_before=[0.1, 0.1, 0.1], database="PostgreSQL 18", needs=needs, recommendation=recommend(needs, brokers),
        brokers=list(brokers), limits=["One machine."],
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


def whole_broker(kind: str) -> Measured:
    fault = msgspec.structs.replace(
        recovery(repeated=3), timeline=[Moment(at / 4, 200.0, 190.0) for at in range(-8, 20)]
    )
    return broker(
        kind, recovery=fault, memory=Memory(client=2**25, client_before=2**24, server=2**28, server_pids=[1]),
        throughput=[throughput(1234, batch=batch) for batch in (1, 10, 100)] + [throughput(9876, way="envelopes")],
        latency=[latency(12.5, at=100), latency(None, at=10)],
    )  # fmt: skip


def test_page_needs_nothing_from_outside() -> None:
    page = rendered(report(whole_broker("postgres"), whole_broker("kafka")))

    assert not OUTSIDE.search(page)
    assert len(page.encode()) < 1_000_000


def test_page_is_well_formed() -> None:
    page = rendered(report(whole_broker("postgres"), whole_broker("kafka")))
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "circle", "line", "rect", "path", "polyline"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("circle", "line", "rect", "path", "polyline"):
                assert open_tags.pop() == tag

    Reader().feed(page)

    assert open_tags == []


def test_every_drawing_is_xml() -> None:
    page = rendered(report(whole_broker("rabbitmq")))
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)

    assert len(drawings) >= 6
    assert [ElementTree.fromstring(one).tag for one in drawings] == ["svg"] * len(drawings)


def test_page_says_what_was_measured() -> None:
    page = rendered(report(whole_broker("kafka")))

    for words in ("2,468", "12.5 ms", "0 lost, 3 handed out twice", "256 MiB", "One machine."):
        assert words in page


def page_after(fault: Recovery) -> str:
    return rendered(report(broker("kafka", recovery=fault)))


def test_broker_that_lost_messages_came_back_all_the_same() -> None:
    page = page_after(recovery(lost=3, caught_up_s=None))

    assert "It did not come back" not in page
    assert "It worked again after 2.0 s, of which 2.0 s until its start command had ended. 3 never came." in page
    assert "<td>3 never came</td>" in page and "<td>never</td>" not in page


@pytest.mark.parametrize(
    ("sending_s", "handling_s", "words"),
    [
        (None, None, "It did not come back."),
        (None, 2.0, "It came back, but confirmed nothing that was sent after the kill."),
        (2.0, None, "It came back, but handed out nothing that was sent after the kill."),
    ],
)
def test_page_says_which_half_of_a_broker_did_not_come_back(
    sending_s: float | None, handling_s: float | None, words: str
) -> None:
    fault = msgspec.structs.replace(recovery(caught_up_s=None), sending_s=sending_s, handling_s=handling_s)
    page = page_after(fault)

    assert words in page and "<td>never</td>" in page


def test_page_escapes_what_others_wrote() -> None:
    strange = broker("kafka", about="<b>&", gaps=[Gap(what="<i>", why="<u>", fix="\"'")])
    page = rendered(report(strange))

    assert "<b>" not in page and "<i>" not in page and "<u>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_page_tells_of_an_interrupted_quick_run_on_a_busy_machine() -> None:
    page = rendered(report(broker("kafka"), is_complete=False, is_quick=True, load_before=[3.0, 0, 0]))

    assert "The run was interrupted" in page and "A quick run" in page and "load 3.00" in page


def test_page_of_nothing_still_says_why() -> None:
    away = Measured(
        name="kafka", kind="kafka", url="kafka://x", gaps=[Gap(what="everything", why="It is away.", fix="Start it.")]
    )
    page = rendered(report(away))

    assert "Nothing was measured" in page and "It is away. To have it: Start it." in page


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50), (99, 99), (99.9, 100), (100, 100), (1, 1)]
)  # fmt: skip
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([float(one) for one in range(1, 101)], percent) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.05, "0.05"), (7.0, "7"), (12.0, "12"), (1000.0, "1k"), (12_345.0, "12.3k"), (250_000.0, "250k"), (2e6, "2M")],
)
def test_short_numbers(value: float, words: str) -> None:
    assert charts.short(value) == words
