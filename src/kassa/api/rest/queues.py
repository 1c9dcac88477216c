"""Queues, for the people who run the house: their records are those of all merchants, so no merchant's key opens this door.

Each call says how a thing shall be, or takes what is there, so it may be repeated without an Idempotency-Key.
"""

import base64
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta

from kassa.api.decode import BodyDecoder, read_query, refused
from kassa.api.http import Request, Response
from kassa.api.rest.fields import Nothing
from kassa.api.route import Answer, Route
from kassa.errors import BrokerUnreachable, QueueNotFound, QueueNotPausable, QueueNotPurgeable
from kassa.merchants.model import Caller, Scope
from kassa.messaging.activity import Flow
from kassa.messaging.queues import Dead, Queue, Queues, Waiting

PURGE_S = 20.0
"""A request should not take longer; what is left is told, and goes with the next one."""
REPLAY_MAX = 10_000

log = structlog.get_logger("kassa.api.queues")

_encode = msgspec.json.Encoder().encode

Flows = Mapping[tuple[str, str], Flow]
"""How queues move, by topic and group."""


class WatchedQueue(Queue, frozen=True, kw_only=True):
    """How one queue is doing, and how it moves: over the last five seconds, in all processes together. null: no process tells of
    it, or it began a moment ago."""

    handled_per_s: float | None
    """Throughput: records whose effect is durable."""
    received_per_s: float | None
    """Handed out, each time that they were."""
    retried_per_s: float | None
    given_up_per_s: float | None
    p50_s: float | None
    """Latency from produced to handled: half of the records took no longer; null also where none was handled."""
    p99_s: float | None


class AllQueues(msgspec.Struct, frozen=True):
    """Every queue, by kind and name."""

    data: list[WatchedQueue]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A record that waits, or was given up. The body is text where it is UTF-8, else base64."""

    id: str
    key: str
    attempts: int
    headers: dict[str, str]
    body: str | None
    body_base64: str | None


class WaitingRecord(Record, frozen=True, kw_only=True):
    """One that waits."""

    state: str
    """ready, delayed, in_flight, or of a log group: retry, behind."""
    created_at: datetime
    due: datetime | None
    reason: str | None
    """Why it failed last."""


class DeadRecord(Record, frozen=True, kw_only=True):
    """One that was given up."""

    died_at: datetime
    reason: str
    first_error: str | None
    last_error: str | None


class QueuePeek(msgspec.Struct, frozen=True):
    """How a queue is doing, and its oldest records. Those that wait at a broker cannot be looked at without taking them."""

    queue: WatchedQueue
    data: list[WaitingRecord]


class DeadRecords(msgspec.Struct, frozen=True):
    """What was given up."""

    data: list[DeadRecord]


class ReplayAnswer(msgspec.Struct, frozen=True):
    """How many were put back, or are sent again."""

    replayed: int
    left: Annotated[
        int,
        Meta(
            description="Of the same, how many `limit` left dead: the same request takes the next. 0: it was all of them"
        ),
    ]


class PurgeAnswer(msgspec.Struct, frozen=True):
    """How many are gone, and how many are left: in somebody's hands, or there was no time for them."""

    gone: int
    left: int


class HowMany(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many records to show."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 20


class ReplayBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which dead records: by name, of a time, or all (not with `ids`); or, of a relay, which events to send to its broker
    again."""

    ids: Annotated[list[Annotated[str, Meta(max_length=40)]], Meta(min_length=1, max_length=1000)] | None = None
    all: bool = False
    died_from: Annotated[datetime, Meta(tz=True)] | None = None
    died_to: Annotated[datetime, Meta(tz=True)] | None = None
    since: Annotated[datetime, Meta(tz=True, description="Of relay:BROKER:TOPIC: every event since")] | None = None
    beyond_inboxes: Annotated[
        bool, Meta(description="With `since`: also events that services may have forgotten, and then handle twice")
    ] = False
    limit: Annotated[
        int, Meta(ge=1, le=REPLAY_MAX, description="At most so many dead records; `left` says how many more there are")
    ] = 1000
    per_second: Annotated[int, Meta(ge=100, le=100_000, description="At most so many a second")] = 1000


class PurgeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to throw away."""

    dead: bool = False
    """True: what was given up, instead of what waits."""


class QueueRoutes:
    """The handlers."""

    def __init__(self, queues: Queues, flows: Callable[[], Flows]) -> None:
        self._queues = queues
        self._flows = flows
        self._replay = BodyDecoder(ReplayBody)
        self._purge = BodyDecoder(PurgeBody)
        self._nothing = BodyDecoder(Nothing)

    async def all(self, request: Request, caller: Caller) -> Response:
        """Every queue."""
        flows = self._flows()
        return Response(200, _encode(AllQueues([_watched(one, flows) for one in await self._queues.all()])))

    async def peek(self, request: Request, caller: Caller) -> Response:
        """One queue, and its oldest records."""
        query, name = read_query(request, HowMany), request.params["name"]
        queue, peeked = await self._queues.one(name), await self._queues.peek(name, query.limit)
        watched = _watched(queue, self._flows())
        return Response(200, _encode(QueuePeek(watched, [_waiting(one) for one in peeked.records])))

    async def dead(self, request: Request, caller: Caller) -> Response:
        """What was given up."""
        query = read_query(request, HowMany)
        found = await self._queues.dead(request.params["name"], query.limit)
        return Response(200, _encode(DeadRecords([_dead(one) for one in found])))

    async def pause(self, request: Request, caller: Caller) -> Response:
        """Nobody gets anything of it."""
        self._nothing.optional(request)
        return await self._done(request, caller, self._queues.pause)

    async def resume(self, request: Request, caller: Caller) -> Response:
        """It goes on."""
        self._nothing.optional(request)
        return await self._done(request, caller, self._queues.resume)

    async def _done(self, request: Request, caller: Caller, act: Callable[[str], Awaitable[None]]) -> Response:
        name = request.params["name"]
        await act(name)
        _tell(act.__name__, name, caller)
        return Response(200, _encode(_watched(await self._queues.one(name), self._flows())))

    async def purge(self, request: Request, caller: Caller) -> Response:
        """Throws away what waits, or what was given up."""
        body, name = self._purge.optional(request), request.params["name"]
        if body.dead:
            answer = PurgeAnswer(await self._queues.forget_dead(name), 0)
        else:
            answer = PurgeAnswer(*await self._queues.purge(name, within_s=PURGE_S))
        _tell("purge", name, caller, dead=body.dead, gone=answer.gone)
        return Response(200, _encode(answer))

    async def replay(self, request: Request, caller: Caller) -> Response:
        """Puts dead records back, or events on their way again."""
        body, name = self._replay(request), request.params["name"]
        which = body.ids is not None or body.all or body.died_from is not None or body.died_to is not None
        if which == (body.since is not None):
            raise refused("all", "say which: ids, died_from, died_to, or all; or since, of a relay")
        if body.ids is not None and body.all:
            raise refused("all", "say ids or all, not both")
        if body.beyond_inboxes and body.since is None:
            raise refused("beyond_inboxes", "it goes with since")
        if body.since is not None:
            answer = ReplayAnswer(
                await self._queues.send_again(name, body.since, beyond_inboxes=body.beyond_inboxes), 0
            )
        else:
            found = await self._queues.replay(
                name, ids=body.ids, died_from=body.died_from, died_to=body.died_to, per_second=body.per_second,
                limit=body.limit,
            )  # fmt: skip
            answer = ReplayAnswer(*found)
        _tell("replay", name, caller, replayed=answer.replayed, since=body.since and body.since.isoformat())
        return Response(200, _encode(answer))

    def routes(self) -> list[Route]:
        """All routes of the noun."""
        path, scope = "/v1/queues", Scope.OPERATOR
        missing = (QueueNotFound,)
        return [
            Route("GET", path, "Every queue, how it is doing, and how it moves. For operators.", self.all,
                  {200: Answer(AllQueues, "Groups, then outboxes, then groups of the event log")}, scope),
            Route("GET", path + "/{name}", "One queue, and its oldest records.", self.peek,
                  {200: Answer(QueuePeek, "Without touching them")}, scope, query=HowMany, problems=missing),
            Route("GET", path + "/{name}/dead", "What was given up, and why.", self.dead,
                  {200: Answer(DeadRecords, "Newest first; of a log group oldest first")}, scope, query=HowMany,
                  problems=missing),
            Route("POST", path + "/{name}/pause", "Nobody gets anything of it until it is resumed.", self.pause,
                  {200: Answer(WatchedQueue, "As it is now")}, scope, body=Nothing, problems=(*missing, QueueNotPausable),
                  example={}),
            Route("POST", path + "/{name}/resume", "It goes on.", self.resume,
                  {200: Answer(WatchedQueue, "As it is now")}, scope, body=Nothing,
                  problems=(*missing, QueueNotPausable), example={}),
            Route("POST", path + "/{name}/purge", "Throw away what waits and is in nobody's hands.", self.purge,
                  {200: Answer(PurgeAnswer, "What is gone, and what is left")}, scope, body=PurgeBody,
                  problems=(*missing, QueueNotPurgeable, BrokerUnreachable), example={"dead": True}),
            Route("POST", path + "/{name}/replay", "Put back what was given up.", self.replay,
                  {200: Answer(ReplayAnswer, "What was handled already is not handled twice")}, scope, body=ReplayBody,
                  problems=missing, example={"all": True}),
        ]  # fmt: skip


def _tell(act: str, name: str, caller: Caller, **facts: object) -> None:
    """Who did it, for those who ask later."""
    log.warning(f"queue.{act}", queue=name, key=f"key_{caller.key_id}", **facts)


def _watched(queue: Queue, flows: Flows) -> WatchedQueue:
    flow = flows.get((queue.topic, queue.group))
    handled, received, retried, given_up = (
        (None,) * 4
        if flow is None
        else (round(one, 3) for one in (flow.handled, flow.received, flow.retried, flow.dead))
    )
    return WatchedQueue(
        **msgspec.structs.asdict(queue), handled_per_s=handled, received_per_s=received, retried_per_s=retried,
        given_up_per_s=given_up, p50_s=flow and flow.p50_s, p99_s=flow and flow.p99_s,
    )  # fmt: skip


def _content(body: bytes) -> tuple[str | None, str | None]:
    try:
        return body.decode(), None
    except UnicodeDecodeError:
        return None, base64.b64encode(body).decode()


def _waiting(one: Waiting) -> WaitingRecord:
    text, raw = _content(one.body)
    return WaitingRecord(
        id=one.id, key=one.key, attempts=one.attempts, headers=one.headers, body=text, body_base64=raw, state=one.state,
        created_at=one.created_at, due=one.due, reason=one.reason,
    )  # fmt: skip


def _dead(one: Dead) -> DeadRecord:
    text, raw = _content(one.body)
    return DeadRecord(
        id=one.id, key=one.key, attempts=one.attempts, headers=one.headers, body=text, body_base64=raw,
        died_at=one.died_at, reason=one.reason, first_error=one.first_error, last_error=one.last_error,
    )  # fmt: skip
