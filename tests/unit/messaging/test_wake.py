"""Whoever waits for work is told apart from one who is only nudged."""

from kassa.messaging.wake import Watch


async def test_a_nudge_ends_the_wait_and_is_no_work() -> None:
    watch = Watch()

    watch.nudge()
    assert await watch.wait(60.0) is False
    watch.set()
    watch.nudge()
    assert await watch.wait(60.0) is True
    assert await watch.wait(0.0) is False
