"""What a run measures, as data: one document, the same for the page, for programs and for the recommendation. Pure."""

from typing import Any

import msgspec


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """One sender with one batch under way, then one receiver who acknowledges each batch."""

    way: str
    """`single`: a broker's message per record; `envelopes`: a record batch per message, as between Kassa's own processes;
    `unordered`: a message per record without a key."""
    batch: int
    send_per_s: float
    """Records confirmed."""
    receive_per_s: float
    """Records received and acknowledged."""
    send_cpu_us: float
    """Processor time of our process for each record."""
    receive_cpu_us: float
    sent: int
    received: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """From when a record should have been sent to when a handler has it, at a steady load. What there were too few records to
    tell is None."""

    asked_per_s: float
    is_half_of_most: bool
    """Whether this load is half of what was measured as most, and not a fixed one."""
    reached_per_s: float
    samples: int
    p50_ms: float
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float
    keeps_up: bool
    """Whether what was asked went through without growing behind."""
    cpu_us: float
    """Processor time of our process for each record, sent and handled."""


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """What happened in a fraction of a second of a fault."""

    at_s: float
    """Since the kill; negative before it."""
    confirmed_per_s: float
    handled_per_s: float


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """kill -9 of the server under a steady load, and its start."""

    what: str
    """Which process was killed, and how."""
    load_per_s: float
    started_s: float
    """From the kill to the end of the start command, the pause before it included."""
    pause_s: float
    """How long we left it dead."""
    sending_s: float | None
    """From the kill until a record that was sent after it was confirmed; None: it never was."""
    handling_s: float | None
    """… until such a record was handled."""
    caught_up_s: float | None
    """… until everything that had waited was handled; None: some of it never was."""
    sent: int
    confirmed: int
    handled: int
    """Different records."""
    lost: int
    """Confirmed, and never handled."""
    repeated: int
    """Handed out again after they were handled: what the inbox of a Kassa consumer refuses."""
    out_of_order: int
    """Records that came after a later one of their key, repeats left out."""
    unconfirmed_why: str = ""
    """What the broker said of those that it never confirmed."""
    timeline: list[Moment]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """In bytes; shared pages counted in parts (PSS)."""

    client: int
    """Of our process at its largest, the Python program included."""
    client_before: int
    """… before it knew the broker."""
    server: int | None
    server_pids: list[int]


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was not measured."""

    what: str
    why: str
    fix: str


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One broker."""

    name: str
    kind: str
    """postgres, rabbitmq, kafka, rocketmq, zeromq."""
    url: str
    """Without its password."""
    about: str = ""
    """What is known of the server: version, where it runs."""
    client: str = ""
    """The client library and its version."""
    traits: dict[str, Any] = {}
    throughput: list[Throughput] = []
    latency: list[Latency] = []
    recovery: Recovery | None = None
    memory: Memory | None = None
    gaps: list[Gap] = []
    left_behind: list[str] = []
    """What could not be removed at the broker."""
    took_s: float = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether there is any figure at all."""
        return bool(self.throughput or self.latency)

    def best(self, way: str) -> Throughput | None:
        """The batch size at which most goes through, in and out."""
        return max((one for one in self.throughput if one.way == way), key=through_per_s, default=None)

    @property
    def through_per_s(self) -> float:
        """Records that one process takes from end to end, one by one and in order, at the best batch size; 0: not measured."""
        best = self.best("single")
        return through_per_s(best) if best else 0.0


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody wants of a queue."""

    rate_per_s: float = 200.0
    latency_ms: float = 100.0
    """99 of 100 messages are handled within this."""
    order: bool = True
    """Messages of one payment arrive in the order in which they were sent."""
    retention_days: float = 0.0
    """How long the broker itself keeps what was handled already; 0: not at all."""
    replay: bool = False
    """Consumers that come later read from the beginning, from the broker."""
    outlives_kill: bool = True
    """What was confirmed survives the death of the server."""
    runs: tuple[str, ...] = ()
    """Kinds of brokers that they run anyway."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What the needs say of one broker."""

    name: str
    verdict: str
    """recommended, fits, `fits, as far as measured`, does not fit, or not measured."""
    reasons: list[str]
    against: list[str]


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """In words, and the ranking, best first."""

    headline: str
    words: list[str]
    ranking: list[Choice]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document: the page shows nothing that is not here."""

    at: str
    took_s: float
    seconds: float
    """How long each measurement took."""
    is_quick: bool
    is_complete: bool
    """False: somebody interrupted it."""
    body_bytes: int
    machine: dict[str, Any]
    load_before: list[float]
    database: str
    """The PostgreSQL that is the memory of all of them."""
    needs: Needs
    recommendation: Recommendation
    brokers: list[Measured]
    limits: list[str]
    """Where it stops being true."""


def through_per_s(one: Throughput) -> float:
    """What one process sends and receives at the same time: a record costs its sending and its receiving."""
    if one.send_per_s <= 0 or one.receive_per_s <= 0:
        return 0.0
    return 1.0 / (1.0 / one.send_per_s + 1.0 / one.receive_per_s)
