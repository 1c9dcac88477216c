"""Faults on demand: which operation goes wrong next, how, and how often. Kept in memory; a restart is healthy again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any


class Fault(Enum):
    """What can go wrong. The two sentences of `EFFECTS` say what each does."""

    DROP_BEFORE = "drop_before"
    DROP_AFTER = "drop_after"
    DELAY = "delay"
    STATUS_5XX = "status_5xx"
    STATUS_429 = "status_429"
    GARBAGE = "garbage"
    BAD_SIGNATURE = "bad_signature"
    DUPLICATE = "duplicate"
    LATE = "late"
    MISSING = "missing"
    REORDER = "reorder"
    WRONG_AMOUNT = "wrong_amount"


CALLBACK = "callback"
OPERATIONS = ("create", "query", "close", "refund", "refund_query", "abnormal_refund", "certificates", CALLBACK)

ON_REQUEST = {
    Fault.DROP_BEFORE: "the connection is closed, nothing is processed",
    Fault.DROP_AFTER: "processed, then the connection is closed without an answer",
    Fault.DELAY: "processed at once, answered after delay_ms",
    Fault.STATUS_5XX: "answered 500 SYSTEM_ERROR without signature, nothing is processed",
    Fault.STATUS_429: "answered 429 FREQUENCY_LIMITED without signature, nothing is processed",
    Fault.GARBAGE: "processed, answered 200 with a signed body that is not JSON",
    Fault.BAD_SIGNATURE: "processed, answered with a signature of something else",
    Fault.DUPLICATE: "processed twice, the second answer is sent",
    Fault.LATE: "processed and answered only after delay_ms, even if the caller has left",
    Fault.MISSING: "never processed nor answered; the connection is closed after delay_ms",
    Fault.REORDER: "processed after the next request, or after delay_ms",
    Fault.WRONG_AMOUNT: "one unit too much: in the order itself on create, else in the answer (close has no amount)",
}
ON_CALLBACK = {
    Fault.DROP_BEFORE: "connected, nothing sent, tried again by the schedule",
    Fault.DROP_AFTER: "sent, the answer is not read, tried again by the schedule",
    Fault.DELAY: "sent after delay_ms",
    Fault.STATUS_5XX: "sent, the answer is taken for a 500, tried again by the schedule",
    Fault.STATUS_429: "sent, the answer is taken for a 429, tried again by the schedule",
    Fault.GARBAGE: "a signed body that is not JSON is sent instead, tried again by the schedule",
    Fault.BAD_SIGNATURE: "sent with a signature of something else, tried again by the schedule",
    Fault.DUPLICATE: "sent twice at the same time",
    Fault.LATE: "put off by delay_ms, other callbacks go first",
    Fault.MISSING: "never sent, at no try",
    Fault.REORDER: "sent after the next callback, or after delay_ms",
    Fault.WRONG_AMOUNT: "one unit too much in its amount",
}

_DELAYS_MS = {Fault.DELAY: 1_000, Fault.LATE: 10_000, Fault.MISSING: 60_000, Fault.REORDER: 5_000}
"""When the fault names none. Missing outlasts any client's patience, and still ends."""
DELAY_MS_MAX = 3_600_000
TIMES_MAX = 1_000_000


class FaultInvalid(ValueError):
    """What was asked for is not a fault that this sandbox knows; the message says why."""


@dataclass(frozen=True, slots=True)
class Armed:
    """A fault that waits for its operation."""

    on: str
    fault: Fault
    times: int
    delay_ms: int

    @property
    def delay_s(self) -> float:
        return self.delay_ms / 1000

    def shown(self) -> dict[str, Any]:
        effects = ON_CALLBACK if self.on == CALLBACK else ON_REQUEST
        return {**asdict(self), "fault": self.fault.value, "effect": effects[self.fault]}


def read_fault(asked: Mapping[str, Any]) -> Armed:
    """`{"on", "fault", "times": 1, "delay_ms": …}`. Raises FaultInvalid."""
    unknown = asked.keys() - {"on", "fault", "times", "delay_ms"}
    if unknown:
        raise FaultInvalid(f"unknown field: {', '.join(sorted(unknown))}")
    on = asked.get("on")
    if on not in OPERATIONS:
        raise FaultInvalid(f"on must be one of {', '.join(OPERATIONS)}")
    try:
        fault = Fault(asked.get("fault"))
    except ValueError:
        raise FaultInvalid(f"fault must be one of {', '.join(fault.value for fault in Fault)}") from None
    times = _whole(asked, "times", default=1, least=1, most=TIMES_MAX)
    delay_ms = _whole(asked, "delay_ms", default=_DELAYS_MS.get(fault, 0), least=0, most=DELAY_MS_MAX)
    return Armed(on=str(on), fault=fault, times=times, delay_ms=delay_ms)


def _whole(asked: Mapping[str, Any], name: str, *, default: int, least: int, most: int) -> int:
    value = asked.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise FaultInvalid(f"{name} must be a whole number from {least} to {most}")
    return value


class Faults:
    """The armed faults, oldest first. Each request or callback meets at most one."""

    def __init__(self) -> None:
        self._armed: list[Armed] = []

    def arm(self, fault: Armed) -> None:
        self._armed.append(fault)

    def take(self, on: str) -> Armed | None:
        """The fault that the next `on` meets; used up by one."""
        for place, armed in enumerate(self._armed):
            if armed.on == on:
                if armed.times > 1:
                    self._armed[place] = replace(armed, times=armed.times - 1)
                else:
                    del self._armed[place]
                return armed
        return None

    def clear(self) -> int:
        """How many were armed."""
        count = len(self._armed)
        self._armed.clear()
        return count

    def shown(self) -> list[dict[str, Any]]:
        return [armed.shown() for armed in self._armed]
