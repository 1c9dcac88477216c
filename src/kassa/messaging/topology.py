"""Which topics exist, and who receives them: declared here, created by each binder, printable. Pure."""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

LANES = 8
"""Lanes of a topic on the wire, so that envelopes fill; more lanes mean more consumers side by side."""


class Topic(NamedTuple):
    """A topic with its groups. Each group gets every record; within a group each record is handled once."""

    name: str
    groups: tuple[str, ...]
    about: str
    lanes: int = LANES
    keyed: bool = True
    """Whether records of one key keep their order."""


EVENTS = Topic("kassa.events", (), "Every event of INTERFACES, keyed by its root.")

TOPOLOGY: tuple[Topic, ...] = (EVENTS,)


def lane(key: str, lanes: int) -> int:
    """Where records of a key go: the same in every process and language."""
    return crc32(key.encode()) % lanes


def describe(topics: Sequence[Topic]) -> str:
    """The topology as a person reads it."""
    lines = []
    for topic in topics:
        lines.append(f"{topic.name}  {topic.lanes} lanes{', ordered by key' if topic.keyed else ''}")
        lines.append(f"    {topic.about}")
        lines += [f"    → {group}" for group in topic.groups]
    return "\n".join(lines)
