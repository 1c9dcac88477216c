"""Facts and work between programs. For services of one's own: `Messaging` (library.py), used outside Kassa too."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kassa.messaging.consumer import Unavailable
    from kassa.messaging.library import Message, Messaging, NoReply, Reject
    from kassa.messaging.topology import Topic

__all__ = ["Message", "Messaging", "NoReply", "Reject", "Topic", "Unavailable"]


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: whoever wants one of the parts below pays for no other.
    if name == "Topic":
        from kassa.messaging.topology import Topic

        return Topic
    if name in __all__:
        from kassa.messaging import library

        return getattr(library, name)
    raise AttributeError(f"kassa.messaging has no {name}")
