"""Whole lives of payments from seeds. A seed that fails is seen again with `kassa simulate --seed N`."""

import os
import subprocess
import sys
from collections import Counter

import pytest

import tally
from kassa.simulation import Report, main, simulate, simulate_all
from kassa.simulation.report import told

SEEDS = 1000
STEPS = 28
"""Shorter lives than usual, so that a thousand of them take half a minute on a busy core."""
LONG = range(SEEDS, SEEDS + 100_000)
TELL_EVERY = 10_000

MUST_HAPPEN = (
    "crashes", "door_doubts", "lies", "repeats", "callbacks_missing", "callbacks_twice", "cancels", "resolves",
    "line_not_sent", "line_lost_before", "line_arrives_later", "line_lost_after", "line_error_before",
    "line_error_after", "line_too_many", "line_garbled", "line_unsigned",
    "payment.succeeded", "payment.closed", "payment.unknown", "payment.attempt_failed", "payment.duplicate_paid",
    "payment.late_succeeded", "payment.late_refunding", "payment.late_refunded", "payment.held", "topup.succeeded",
    "topup.late_succeeded", "refund.succeeded", "refund.failed", "refund.abnormal", "refund.reversed",
    "refund.cancelled", "wallet_payments",
)  # fmt: skip
"""What a thousand seeds have all met; otherwise they would prove less than they say."""


def _all_good(reports: list[Report]) -> Counter[str]:
    broken = [told(report) for report in reports if not report.is_good]
    assert not broken, "\n\n".join(broken[:3])
    return sum((Counter(dict(report.counts)) for report in reports), Counter())


def test_a_thousand_seeds_keep_every_promise() -> None:
    happened = _all_good(list(simulate_all(range(SEEDS), STEPS)))
    tally.count("seeds", SEEDS)

    assert [name for name in MUST_HAPPEN if not happened[name]] == []


@pytest.mark.long
def test_a_hundred_thousand_seeds_keep_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    """On every core. Tells how far it is, since it takes a quarter of an hour on two."""
    happened: Counter[str] = Counter()
    for done, report in enumerate(simulate_all(LONG, STEPS, jobs=os.cpu_count() or 1), start=1):
        assert report.is_good, told(report)
        happened.update(report.counts)
        if done % TELL_EVERY == 0:
            tally.count("seeds", TELL_EVERY)
            with capsys.disabled():
                print(f"\n{done:,} seeds are good", end="", flush=True)

    assert [name for name in MUST_HAPPEN if not happened[name]] == []
    with capsys.disabled():
        print(":", ", ".join(f"{number:,} {name}" for name, number in sorted(happened.items())))


def test_a_seed_is_the_same_world_in_every_process() -> None:
    """Neither the clock, nor chance, nor the order of hashes of this machine goes in: the chains' heads are equal."""
    program = "from kassa.simulation import simulate; r = simulate(7); print(r.digest, sorted(r.counts.items()))"

    told_elsewhere = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout.decode()
        for seed in ("1", "2")
    }

    report = simulate(7)
    assert told_elsewhere == {f"{report.digest} {sorted(report.counts.items())}\n"}
    assert report == simulate(7)
    assert report.digest != simulate(8).digest


def test_the_command_tells_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "0..3"]) == 0
    assert "4 seeds are good." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--seeds", "many"])
