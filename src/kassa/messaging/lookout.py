"""Waiting for messages in many queues of PostgreSQL: one question for all of them, however many wait.

A consumer looks once, and waits here when there was nothing. He looks again when a message was sent from here, when one is due,
when another process says that it wrote any, and in doubt. What is not said is seen within 250 ms, by the question for all.
"""

import asyncio

import structlog

from kassa.messaging.wake import BRIEF_S, COALESCE_S, MESSAGES, POLL_S, Wakeups, Watch
from kassa.messaging.work import MessageWork
from kassa.supervisor import end_tasks

FEW = 16
"""Of so many queues all are looked at when a message was written anywhere: nobody waits for an answer first."""
DUTY = 4
"""Of many, the next question waits so many times as long as the last one took, so that under load it takes no more than a fifth."""
ANSWER_S = 1.0
"""A question that takes longer may never be answered, as on a connection that died without a word."""
FORGET_S = 5.0
"""A queue for which nobody waits any more; between two calls of a ZeroMQ peer it goes on being asked for."""

log = structlog.get_logger("kassa.messaging.lookout")


class _Queue:
    def __init__(self) -> None:
        self.may_have = True
        """Whether it is worth a look: something happened since the last one began, or nobody has looked yet."""
        self.is_unsure = True
        """Whether it has to be asked when something is due, after a look or what a consumer gave back."""
        self.blocked = 0
        """How often in a row something was due and a look did not get it: its key is in somebody's hand."""
        self.waiting: set[Watch] = set()
        self.left_at = 0.0
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_to_ask(self) -> bool:
        """Whether somebody waits without knowing for what."""
        return self.is_unsure and bool(self.waiting)


class Lookout:
    """Says to those who wait in this process when a look is worth it."""

    def __init__(self, work: MessageWork, wakeups: Wakeups) -> None:
        self._work = work
        self._watch = wakeups.watch(MESSAGES)
        self._queues: dict[str, _Queue] = {}
        self._asking: asyncio.Task[None] | None = None
        """Only while somebody waits, or has a moment ago."""
        self._waiters = 0
        self._left_at = 0.0
        """When the last one left."""
        self._late: asyncio.Task[dict[str, float]] | None = None
        """A question that took too long; until it has ended there is no other."""
        self._is_answered = True
        """Whether the last question was: while the database is away it is said once."""

    def begin(self, name: str) -> bool:
        """Whether to look into a queue now; then what happens from now on makes it worth another look."""
        queue = self._queues.setdefault(name, _Queue())
        if not queue.may_have and self._asking is not None:
            return False
        queue.may_have, queue.is_unsure = False, True
        return True

    def found(self, name: str) -> None:
        """A look got something: there may be more."""
        if (queue := self._queues.get(name)) is not None:
            queue.blocked = 0
            self.wake(name)

    def settled(self, name: str, *, is_given_back: bool) -> None:
        """What was in hand is not any more, and comes again later if it was given back."""
        if (queue := self._queues.get(name)) is not None:
            if queue.blocked:
                self.wake(name)
            if is_given_back:
                queue.is_unsure = True
                self._watch.nudge()

    def wake(self, name: str) -> None:
        """There may be something in a queue."""
        if (queue := self._queues.get(name)) is not None:
            _wake(queue)

    def forget(self, name: str) -> None:
        """A consumer of the queue has ended."""
        queue = self._queues.get(name)
        if queue is not None and not queue.waiting:
            _hush(self._queues.pop(name))

    async def wait(self, name: str, watch: Watch, timeout_s: float) -> None:
        """Until a look is worth it or `watch` is set, at most so long."""
        queue = self._queues.setdefault(name, _Queue())
        if queue.may_have:
            return
        queue.waiting.add(watch)
        self._waiters += 1
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_on())
        elif queue.is_unsure or self._waiters == 1:
            self._watch.nudge()
        try:
            await watch.wait(timeout_s)
        finally:
            queue.waiting.discard(watch)
            queue.left_at = self._left_at = asyncio.get_running_loop().time()
            self._waiters -= 1

    async def close(self) -> None:
        """Whoever waits looks, and waits no more."""
        if self._asking is not None:
            await end_tasks(self._asking)

    async def _ask_on(self) -> None:
        clock = asyncio.get_running_loop().time
        all_at = clock() + POLL_S
        try:
            while self._waiters or clock() - self._left_at < FORGET_S:
                if not self._waiters:
                    # Nobody is to be told, so nothing is asked.
                    if await self._watch.wait(FORGET_S):
                        self._wake_all()
                    continue
                is_to_ask = any(queue.is_to_ask for queue in self._queues.values())
                is_written = await self._watch.wait(0.0 if is_to_ask else all_at - clock())
                is_many = len(self._queues) > FEW
                if is_written and not is_many:
                    self._wake_all()
                began = clock()
                if began >= all_at or (is_written and is_many):
                    self._forget_idle(began)
                    all_at = began + POLL_S
                    is_answered = await self._ask(list(self._queues))
                else:
                    is_answered = await self._ask([name for name, queue in self._queues.items() if queue.is_to_ask])
                if not is_answered:
                    # Whoever waits looks by himself, as often as he would be told, and says what is wrong.
                    await asyncio.sleep(POLL_S)
                    self._wake_all()
                elif is_many:
                    await asyncio.sleep(min(max(BRIEF_S, DUTY * (clock() - began)), POLL_S))
        finally:
            # Nobody watches them from now on, so whoever comes next looks first.
            self._asking = None
            for queue in self._queues.values():
                _wake(queue)
            self._queues.clear()

    async def _ask(self, names: list[str]) -> bool:
        """Whether there was an answer, or nothing to ask."""
        if not names:
            return True
        unsure = {name for name in names if self._queues[name].is_unsure}
        for name in unsure:
            self._queues[name].is_unsure = False
        try:
            due_s = await self._answer(names)
        except Exception as error:
            # Whatever it is: who waits looks by himself meanwhile, and nobody else would ask for them again.
            if self._is_answered:
                log.warning("lookout.not_asked", error=type(error).__name__)
            self._is_answered = False
            return False
        self._is_answered = True
        for name in names:
            if (queue := self._queues.get(name)) is not None and not queue.may_have:
                self._expect(queue, due_s.get(name), was_looked_into=name in unsure)
        return True

    async def _answer(self, names: list[str]) -> dict[str, float]:
        """Raises TimeoutError. The question is not waited for while it is given up: that takes as long as the connection likes."""
        if self._late is not None and not self._late.done():
            raise TimeoutError
        self._late = asyncio.create_task(self._work.next_dues(names))
        self._late.add_done_callback(_look)
        try:
            await asyncio.wait({self._late}, timeout=ANSWER_S)
        finally:
            self._late.cancel()
        if not self._late.done():
            raise TimeoutError
        return self._late.result()

    def _expect(self, queue: _Queue, due_s: float | None, *, was_looked_into: bool) -> None:
        if due_s is None or due_s > 0:
            queue.blocked = 0
        if due_s is None or due_s > POLL_S:
            return
        wait_s = max(due_s, BRIEF_S)
        if due_s <= 0:
            if not was_looked_into and not queue.blocked:
                _wake(queue)
                return
            # Whoever has its key may be another process, which says nothing when it lets go of it.
            wait_s = min(BRIEF_S * (1 << min(queue.blocked, 8)), COALESCE_S)
            queue.blocked += 1
        loop = asyncio.get_running_loop()
        if queue.timer is None or queue.timer.when() > loop.time() + wait_s:
            _hush(queue)
            queue.timer = loop.call_later(wait_s, _wake, queue)

    def _wake_all(self) -> None:
        for queue in self._queues.values():
            _wake(queue)

    def _forget_idle(self, now: float) -> None:
        for name, queue in list(self._queues.items()):
            if not queue.waiting and now - queue.left_at > FORGET_S:
                _hush(self._queues.pop(name))


def _look(question: "asyncio.Task[dict[str, float]]") -> None:
    """So that nobody misses an error that came late."""
    if not question.cancelled():
        question.exception()


def _wake(queue: _Queue) -> None:
    _hush(queue)
    queue.may_have = True
    for watch in queue.waiting:
        watch.set()


def _hush(queue: _Queue) -> None:
    if queue.timer is not None:
        queue.timer.cancel()
        queue.timer = None
