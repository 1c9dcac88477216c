"""What Python's garbage collector does in a process that serves for weeks and answers in milliseconds.

Left alone it goes through every module, route and plan of the process again and again, and stops it for 20 to 50 ms each time;
and the more often, the more is under way: whatever is alive when the young are looked at passes for something that stays.
"""

import gc

YOUNG_MAX = 10_000
"""Containers that are made, and not let go of, before the young ones are looked at: more than a few batches have."""


def settle() -> None:
    """What is there now stays until the end, and is not looked at again. To be called when a process is ready to serve."""
    gc.collect()
    gc.freeze()
    _, *older = gc.get_threshold()
    gc.set_threshold(YOUNG_MAX, *older)
