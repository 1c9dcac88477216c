"""Which queue to choose: needs and measurements in, words and a ranking out. Pure.

What was not measured is never recommended as if it had been: it is named, with what is missing. A need that a broker cannot
meet rules it out, however fast it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kassa.bench.model import Choice, Latency, Measured, Needs, Recommendation, through_per_s

ROOM = 2.0
"""So many times the asked rate has to go through: half of it is for bursts, for catching up, and for a larger day."""
NAMES = {
    "postgres": "PostgreSQL alone", "rabbitmq": "RabbitMQ", "kafka": "Kafka", "rocketmq": "RocketMQ", "zeromq": "ZeroMQ",
}  # fmt: skip
NO_SERVER_MORE = ("postgres", "zeromq")
"""What needs no other server than the PostgreSQL that Kassa has anyway."""
KEEPS: dict[str, tuple[float, str]] = {
    "kafka": (3_650.0, "Kafka keeps a topic as long as its `retention.ms` says (7 days unless told)."),
    "rocketmq": (365.0, "RocketMQ keeps what was handled as long as `fileReservedTime` says (3 days unless told)."),
}
"""How long a broker can keep what was handled already: days at most that make sense, and why. The others forget it when it is
acknowledged; Traits says nothing of it, as Kassa's own event log does not need it."""
FORGETS = (
    "It forgets what was acknowledged, and a new reader begins from now. If Kassa's own events are all that you want to read "
    "again: its log in PostgreSQL keeps them for good behind every broker, and `GET /v1/events` goes back to the first."
)
BEGINS = "A consumer of your own may begin at the first that it keeps; new groups of Kassa's begin from now."

RECOMMENDED, FITS, PARTLY, NOT, UNMEASURED = (
    "recommended", "fits", "fits, as far as measured", "does not fit", "not measured",
)  # fmt: skip
_ORDER = (RECOMMENDED, FITS, PARTLY, NOT, UNMEASURED)


class _Judged(NamedTuple):
    broker: Measured
    choice: Choice
    p99_ms: float


def recommend(needs: Needs, brokers: Sequence[Measured]) -> Recommendation:
    """The ranking, and what to do in words."""
    judged = sorted((_judge(needs, one) for one in brokers), key=lambda one: _rank(needs, one))
    choices = [one.choice for one in judged]
    choices += [_unseen(kind) for kind in needs.runs if kind not in {one.kind for one in brokers}]
    fitting = [one for one in judged if one.choice.verdict in (FITS, PARTLY)]
    if not fitting:
        return Recommendation(headline=_none(judged), words=_words_of_none(needs, judged, choices), ranking=choices)
    best = fitting[0]
    if best.choice.verdict == FITS:
        choices[choices.index(best.choice)] = _with(best.choice, RECOMMENDED)
    return Recommendation(headline=_headline(needs, best), words=_words(needs, best, fitting, choices), ranking=choices)


def _rank(needs: Needs, one: _Judged) -> tuple[object, ...]:
    """What they run already comes first among what fits, then what needs no server more, then what has most room."""
    return (
        _ORDER.index(one.choice.verdict), one.broker.kind not in needs.runs, one.broker.kind not in NO_SERVER_MORE,
        one.broker.kind != "postgres", -one.broker.through_per_s, one.p99_ms,
    )  # fmt: skip


# One broker


def _judge(needs: Needs, broker: Measured) -> _Judged:
    if not broker.is_measured:
        why = broker.gaps[0].why if broker.gaps else "Nothing was measured."
        return _Judged(broker, Choice(name=broker.name, verdict=UNMEASURED, reasons=[], against=[why]), float("inf"))
    reasons: list[str] = []
    against: list[str] = []
    open_: list[str] = []
    for look in (_order, _retention, _rate, _latency, _survival):
        look(needs, broker, reasons, against, open_)
    if broker.kind in needs.runs:
        reasons.append("You run it already: nothing new to operate.")
    elif broker.kind in NO_SERVER_MORE:
        reasons.append("It needs no server beside the PostgreSQL that Kassa has anyway.")
    verdict = NOT if against else PARTLY if open_ else FITS
    choice = Choice(name=broker.name, verdict=verdict, reasons=reasons, against=against + open_)
    load = load_for(needs, broker)
    return _Judged(broker, choice, _p99(load) if load else float("inf"))


def _order(needs: Needs, broker: Measured, reasons: list[str], against: list[str], open_: list[str]) -> None:
    if not needs.order:
        return
    if not broker.traits.get("ordered"):
        against.append("It does not keep messages of one key in order.")
    elif broker.recovery is not None and broker.recovery.out_of_order:
        against.append(f"{broker.recovery.out_of_order} messages came out of order after the kill.")
    else:
        reasons.append("It keeps messages of one key in order.")


def _retention(needs: Needs, broker: Measured, reasons: list[str], against: list[str], open_: list[str]) -> None:
    if not needs.replay and needs.retention_days <= 0:
        return
    days, words = KEEPS.get(broker.kind, (0.0, ""))
    if days < max(needs.retention_days, 0.001):
        against.append(FORGETS if not days else f"{_days(needs.retention_days)} is longer than it is made for. {words}")
    else:
        reasons.append(f"{words} {BEGINS}" if needs.replay else words)


def _rate(needs: Needs, broker: Measured, reasons: list[str], against: list[str], open_: list[str]) -> None:
    best = broker.best("single" if needs.order else "unordered") or broker.best("single")
    most = through_per_s(best) if best else 0.0
    if best is None or most <= 0:
        open_.append("Its throughput was not measured.")
        return
    enveloped = broker.best("envelopes")
    times = most / needs.rate_per_s
    if times >= ROOM:
        reasons.append(f"{_number(most)} messages a second through one process: {_times(times)} what you need.")
    elif enveloped and through_per_s(enveloped) >= ROOM * needs.rate_per_s:
        reasons.append(
            f"{_number(through_per_s(enveloped))} messages a second in envelopes, between Kassa's own processes; "
            f"{_number(most)} one by one, for anybody's consumers."
        )
    elif times >= 1:
        open_.append(f"{_number(most)} messages a second leave little room above {_number(needs.rate_per_s)}.")
    else:
        against.append(f"{_number(most)} messages a second are fewer than {_number(needs.rate_per_s)}.")


def _latency(needs: Needs, broker: Measured, reasons: list[str], against: list[str], open_: list[str]) -> None:
    load = load_for(needs, broker)
    if load is None:
        open_.append("Its latency was not measured.")
        return
    at = f"at {_number(load.asked_per_s)} a second"
    kind = "p99" if load.p99_ms is not None else f"the longest of {load.samples}"
    if not load.keeps_up:
        (against if load.asked_per_s <= needs.rate_per_s else open_).append(f"It did not keep up {at}.")
    elif _p99(load) > needs.latency_ms:
        words = f"{kind} was {_ms(_p99(load))} {at}; you need {_ms(needs.latency_ms)}."
        larger = _larger_within(needs, broker, load)
        if larger is not None:
            open_.append(
                f"{words} At {_number(larger.asked_per_s)} it was {_ms(_p99(larger))}, so something stood still for a moment: "
                "measure longer, with `--seconds 10`."
            )
        else:
            # A larger load than asked proves nothing against it.
            (against if load.asked_per_s <= 2 * needs.rate_per_s else open_).append(words)
    else:
        reasons.append(f"{kind} was {_ms(_p99(load))} {at}; you need {_ms(needs.latency_ms)}.")
        if load.asked_per_s < needs.rate_per_s:
            open_.append(f"Its latency was measured up to {_number(load.asked_per_s)} a second, not at your rate.")


def _survival(needs: Needs, broker: Measured, reasons: list[str], against: list[str], open_: list[str]) -> None:
    if not needs.outlives_kill:
        return
    fault = broker.recovery
    if fault is None:
        open_.append("What a kill -9 of its server does was not measured.")
    elif fault.lost:
        against.append(f"{fault.lost} of {fault.confirmed} confirmed messages were lost by kill -9.")
    elif fault.caught_up_s is None:
        against.append("It did not work again after kill -9.")
    else:
        repeats = f", {fault.repeated} came twice (Kassa's consumers take them once)" if fault.repeated else ""
        reasons.append(
            f"kill -9 lost none of {_number(fault.confirmed)} messages{repeats}; {_s(fault.caught_up_s)} until all was normal."
        )


def load_for(needs: Needs, broker: Measured) -> Latency | None:
    """The measured load that is nearest to the asked rate from above, else the largest."""
    loads = sorted(broker.latency, key=lambda one: one.asked_per_s)
    return next((one for one in loads if one.asked_per_s >= needs.rate_per_s), loads[-1] if loads else None)


def _larger_within(needs: Needs, broker: Measured, than: Latency) -> Latency | None:
    """A larger load that was as quick as needed: whoever can do that is not slow at less, whatever came between once."""
    return next(
        (
            one
            for one in broker.latency
            if one.asked_per_s > than.asked_per_s and one.keeps_up and _p99(one) <= needs.latency_ms
        ),
        None,
    )


def _p99(load: Latency) -> float:
    return load.max_ms if load.p99_ms is None else load.p99_ms


def _unseen(kind: str) -> Choice:
    return Choice(
        name=kind, verdict=UNMEASURED, reasons=["You run it already."],
        against=[f"It was not measured: add --broker {_example(kind)}."],
    )  # fmt: skip


# In words


def _headline(needs: Needs, best: _Judged) -> str:
    name = called(best.broker)
    if best.choice.verdict == PARTLY:
        return f"{name}, as far as was measured"
    if best.broker.kind in needs.runs:
        return f"Stay with {name}"
    return f"Take {name}"


def _words(needs: Needs, best: _Judged, fitting: Sequence[_Judged], choices: Sequence[Choice]) -> list[str]:
    words = [f"You asked for {described(needs)}.", " ".join(best.choice.reasons)]
    if best.choice.verdict == PARTLY:
        words.append("What is open: " + " ".join(best.choice.against))
    if best.broker.kind in needs.runs and len(fitting) > 1:
        faster = max(fitting, key=lambda one: one.broker.through_per_s)
        if faster.broker.through_per_s > ROOM * best.broker.through_per_s:
            words.append(f"{called(faster.broker)} takes more, but you would have one more system to run for it.")
    others = [called(one.broker) for one in fitting if one is not best]
    if others:
        words.append(f"{_and(others)} would do as well.")
    return words + _about_unmeasured(choices)


def _none(judged: Sequence[_Judged]) -> str:
    return "Nothing that was measured fits" if any(one.broker.is_measured for one in judged) else "Nothing was measured"


def _words_of_none(needs: Needs, judged: Sequence[_Judged], choices: Sequence[Choice]) -> list[str]:
    words = [f"You asked for {described(needs)}."]
    words += [
        f"{called(one.broker)}: {' '.join(one.choice.against)}" for one in judged if one.choice.verdict == NOT
    ]  # fmt: skip
    return words + _about_unmeasured(choices)


def _about_unmeasured(choices: Sequence[Choice]) -> list[str]:
    missing = [NAMES.get(one.name, one.name) for one in choices if one.verdict == UNMEASURED]
    return [f"Nothing is said of {_and(missing)}: not measured."] if missing else []


def described(needs: Needs) -> str:
    """The needs as a sentence would have them."""
    parts = [f"{_number(needs.rate_per_s)} messages a second", f"99 of 100 handled within {_ms(needs.latency_ms)}"]
    parts.append("messages of one key in order" if needs.order else "no order")
    if needs.retention_days > 0:
        parts.append(f"{_days(needs.retention_days)} of what was handled kept by the broker")
    if needs.replay:
        parts.append("later consumers that read from the beginning")
    if needs.outlives_kill:
        parts.append("nothing lost by a kill")
    if needs.runs:
        parts.append(f"{_and([NAMES.get(one, one) for one in needs.runs])} running already")
    return ", ".join(parts)


def called(broker: Measured) -> str:
    """Its name for people; a second one of a kind keeps its number."""
    name = NAMES.get(broker.kind, broker.kind)
    _, dash, number = broker.name.partition("-")
    return f"{name} {number}" if dash else name


def _with(choice: Choice, verdict: str) -> Choice:
    return Choice(name=choice.name, verdict=verdict, reasons=choice.reasons, against=choice.against)


def _example(kind: str) -> str:
    examples = {"rabbitmq": "amqp://USER:PASSWORD@HOST", "postgres": "postgres", "zeromq": "zeromq"}
    return examples.get(kind, f"{kind}://HOST:PORT")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _times(times: float) -> str:
    return f"{times:,.0f} times" if times >= 10 else f"{times:.1f} times"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _s(value: float) -> str:
    return f"{value:.1f} s"


def _days(days: float) -> str:
    return f"{days:,.0f} days" if days != 1 else "1 day"
