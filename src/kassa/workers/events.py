"""Readers of the event log that run as loops: one per group."""

from kassa.messaging.log import Concern, GroupReader, Handler, LogGroup
from kassa.messaging.wake import EVENTS, Wakeups


async def read_for_ever(
    group: LogGroup,
    handler: Handler,
    wakeups: Wakeups,
    *,
    concern: Concern | None = None,
    from_now: bool = False,
) -> None:
    """Hands every event that may concern it to `handler`, in its root's order, until cancelled. Makes the group at its
    first start."""
    await group.create(from_now=from_now)
    watch = wakeups.watch(EVENTS)
    await GroupReader(group, handler, watch.wait, concern=concern).run()
