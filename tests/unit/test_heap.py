"""The garbage collector of a process that serves."""

import subprocess
import sys

PROGRAM = """
import gc
from kassa import heap

heap.settle()
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert gc.get_threshold()[0] == heap.YOUNG_MAX, gc.get_threshold()

class Ring:
    def __del__(self):
        print("a ring that was made later is still found")

ring = Ring()
ring.itself = ring
del ring
gc.collect()
"""


def test_what_is_there_is_not_looked_at_again_and_later_rings_are_found() -> None:
    # In a process of its own: what is settled stays so.
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "a ring that was made later is still found\n", "")
