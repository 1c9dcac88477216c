"""Which queue to choose: needs and measurements in, words and a ranking out."""

from typing import Any

import msgspec
import pytest

from kassa.bench.model import Gap, Latency, Measured, Needs, Recovery, Throughput, through_per_s
from kassa.bench.needs import NOT, PARTLY, RECOMMENDED, UNMEASURED, described, load_for, recommend
from kassa.messaging.binders import postgres


def throughput(per_s: float, *, way: str = "single", batch: int = 100) -> Throughput:
    return Throughput(
        way=way, batch=batch, send_per_s=per_s * 2, receive_per_s=per_s * 2, send_cpu_us=10, receive_cpu_us=10,
        sent=1000, received=1000,
    )  # fmt: skip


def latency(p99_ms: float | None, *, at: float = 1000.0, keeps_up: bool = True) -> Latency:
    return Latency(
        asked_per_s=at, is_half_of_most=False, reached_per_s=at, samples=2000, p50_ms=1, p99_ms=p99_ms, p999_ms=None,
        max_ms=50, keeps_up=keeps_up, cpu_us=100,
    )  # fmt: skip


def recovery(*, lost: int = 0, repeated: int = 0, caught_up_s: float | None = 3.0, out_of_order: int = 0) -> Recovery:
    return Recovery(
        what="it", load_per_s=200, started_s=2, pause_s=0.5, sending_s=2, handling_s=2, caught_up_s=caught_up_s, sent=1000,
        confirmed=1000, handled=1000 - lost, lost=lost, repeated=repeated, out_of_order=out_of_order, timeline=[],
    )  # fmt: skip


def broker(kind: str, per_s: float = 5000, p99_ms: float = 10, **changes: Any) -> Measured:
    whole = Measured(
        name=kind, kind=kind, url=f"{kind}://x", traits=postgres.TRAITS._asdict(), throughput=[throughput(per_s)],
        latency=[latency(p99_ms)], recovery=recovery(),
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


def verdicts(needs: Needs, *brokers: Measured) -> dict[str, str]:
    return {one.name: one.verdict for one in recommend(needs, brokers).ranking}


def test_postgres_alone_is_taken_when_it_does_what_is_needed() -> None:
    said = recommend(Needs(rate_per_s=1000), [broker("kafka", 50_000), broker("postgres")])

    assert said.headline == "Take PostgreSQL alone"
    assert [one.name for one in said.ranking] == ["postgres", "kafka"]
    assert any("Kafka would do as well" in words for words in said.words)


def test_what_they_run_already_goes_before_what_is_faster() -> None:
    said = recommend(Needs(rate_per_s=1000, runs=("rabbitmq",)), [broker("postgres", 50_000), broker("rabbitmq", 3000)])

    assert said.headline == "Stay with RabbitMQ"
    assert any("one more system to run" in words for words in said.words)


def test_a_rate_that_is_too_high_rules_out() -> None:
    said = recommend(Needs(rate_per_s=20_000), [broker("postgres", 5000), broker("kafka", 60_000)])

    assert said.headline == "Take Kafka" or said.headline == "Kafka, as far as was measured"
    assert verdicts(Needs(rate_per_s=20_000), broker("postgres", 5000)) == {"postgres": NOT}


def test_a_rate_without_room_is_not_recommended_without_a_word() -> None:
    said = recommend(Needs(rate_per_s=900), [broker("postgres", 1000)])

    assert said.ranking[0].verdict == PARTLY
    assert "leave little room" in " ".join(said.words)


def test_envelopes_count_for_the_rate_and_are_said() -> None:
    one = broker("rabbitmq", 1500, throughput=[throughput(1500), throughput(20_000, way="envelopes")])

    said = recommend(Needs(rate_per_s=1000), [one])

    assert said.ranking[0].verdict == RECOMMENDED
    assert "in envelopes" in " ".join(said.ranking[0].reasons)


def test_latency_above_the_need_rules_out() -> None:
    assert verdicts(Needs(latency_ms=5, rate_per_s=1000), broker("kafka", p99_ms=6)) == {"kafka": NOT}


def test_latency_is_judged_at_the_load_that_is_nearest_above_the_rate() -> None:
    one = broker("kafka", latency=[latency(3, at=100), latency(400, at=1000), latency(5, at=300)])
    found = load_for(Needs(rate_per_s=200), one)

    assert found is not None and found.asked_per_s == 300


def test_one_stall_at_the_asked_rate_does_not_rule_out_who_was_quick_at_more() -> None:
    stalled = latency(215, at=200)
    ranking = recommend(
        Needs(rate_per_s=200), [broker("rabbitmq", latency=[stalled, latency(180, at=500), latency(38, at=1000)])]
    ).ranking

    assert ranking[0].verdict == PARTLY
    assert "215 ms at 200" in ranking[0].against[0] and "At 1,000 it was 38 ms" in ranking[0].against[0]
    for others in ([latency(180, at=1000)], [latency(38, at=1000, keeps_up=False)], [latency(38, at=100)]):
        assert verdicts(Needs(rate_per_s=200), broker("rabbitmq", latency=[stalled, *others])) == {"rabbitmq": NOT}


def test_latency_at_a_smaller_load_than_asked_proves_little() -> None:
    one = broker("kafka", latency=[latency(3, at=100)])

    assert verdicts(Needs(rate_per_s=1000), one) == {"kafka": PARTLY}


def test_what_did_not_keep_up_at_the_rate_does_not_fit() -> None:
    one = broker("rocketmq", latency=[latency(3, at=200, keeps_up=False)])

    assert verdicts(Needs(rate_per_s=200), one) == {"rocketmq": NOT}


def test_order_is_a_hard_need() -> None:
    unordered = broker("postgres", traits=postgres.TRAITS._replace(ordered=False)._asdict())

    assert verdicts(Needs(order=True), unordered) == {"postgres": NOT}
    assert verdicts(Needs(order=False), unordered) == {"postgres": RECOMMENDED}
    assert verdicts(Needs(), broker("kafka", recovery=recovery(out_of_order=1))) == {"kafka": NOT}


@pytest.mark.parametrize(
    ("kind", "days", "fits"),
    [
        ("kafka", 7, True), ("rocketmq", 3, True), ("postgres", 1, False), ("rabbitmq", 1, False), ("zeromq", 1, False),
        ("rocketmq", 3650, False),
    ],
)  # fmt: skip
def test_retention_is_a_hard_need(kind: str, days: float, fits: bool) -> None:
    found = verdicts(Needs(retention_days=days), broker(kind))

    assert (found[kind] == RECOMMENDED) is fits
    assert (found[kind] == NOT) is not fits


@pytest.mark.parametrize("kind", ["postgres", "rabbitmq", "zeromq"])
def test_replay_from_the_broker_is_a_hard_need(kind: str) -> None:
    """Theirs too that is taken first else: readers of PostgreSQL's queue and new relays begin from now."""
    assert verdicts(Needs(replay=True), broker(kind), broker("kafka")) == {"kafka": RECOMMENDED, kind: NOT}


def test_who_has_no_replay_is_told_what_reads_the_log_from_its_first_event() -> None:
    said = recommend(Needs(replay=True), [broker("postgres")])

    assert said.headline == "Nothing that was measured fits"
    assert "`GET /v1/events` goes back to the first" in " ".join(said.words)


def test_replay_is_said_to_be_of_ones_own_consumers() -> None:
    (kafka,) = recommend(Needs(replay=True), [broker("kafka")]).ranking

    assert any("new groups of Kassa's begin from now" in words for words in kafka.reasons)


def test_a_lost_message_rules_out_unless_it_may_be_lost() -> None:
    one = broker("kafka", recovery=recovery(lost=1))

    assert verdicts(Needs(), one) == {"kafka": NOT}
    assert verdicts(Needs(outlives_kill=False), one) == {"kafka": RECOMMENDED}


def test_one_that_did_not_come_back_does_not_fit() -> None:
    assert verdicts(Needs(), broker("kafka", recovery=recovery(caught_up_s=None))) == {"kafka": NOT}


def test_without_a_kill_it_fits_only_as_far_as_measured() -> None:
    said = recommend(Needs(), [broker("kafka", recovery=None)])

    assert said.headline == "Kafka, as far as was measured"
    assert "What is open: What a kill -9 of its server does was not measured." in said.words


def test_what_was_not_measured_is_never_recommended() -> None:
    away = Measured(
        name="kafka", kind="kafka", url="kafka://x", gaps=[Gap(what="everything", why="It is away.", fix="")]
    )

    said = recommend(Needs(runs=("kafka", "rabbitmq")), [away, broker("postgres")])

    assert said.headline == "Take PostgreSQL alone"
    assert {one.name: one.verdict for one in said.ranking if one.verdict == UNMEASURED} == {
        "kafka": UNMEASURED, "rabbitmq": UNMEASURED,
    }  # fmt: skip
    assert "Nothing is said of Kafka and RabbitMQ: not measured." in said.words


def test_nothing_measured_is_said_as_that() -> None:
    away = Measured(name="kafka", kind="kafka", url="kafka://x")

    assert recommend(Needs(), [away]).headline == "Nothing was measured"
    assert (
        recommend(Needs(latency_ms=1, rate_per_s=1000), [broker("kafka")]).headline == "Nothing that was measured fits"
    )


def test_needs_are_told_back_in_words() -> None:
    said = described(Needs(rate_per_s=2000, latency_ms=50, retention_days=7, replay=True, runs=("kafka",)))

    assert said == (
        "2,000 messages a second, 99 of 100 handled within 50 ms, messages of one key in order, 7 days of what was handled kept "
        "by the broker, later consumers that read from the beginning, nothing lost by a kill, Kafka running already"
    )


def test_sending_and_receiving_at_once_shares_the_time() -> None:
    assert through_per_s(throughput(1000)) == pytest.approx(1000)
