"""What our channels take of aiormq that is not public is there, as it was when they were written.

When this fails after an upgrade: read aiormq's `channel.py` and `connection.py` again and see whether `_Outlet`, `_Reader` and
`Deliveries` (amqp.py) still stand where its own methods and objects of these names did; then widen the version in pyproject.toml.
"""

import asyncio
import inspect
from importlib.metadata import version

import pytest
from aiormq.channel import Channel
from aiormq.connection import Connection, FrameReceiver

from kassa.messaging.binders import amqp

READ = (7, 2)
"""The minor version whose source was read; pyproject.toml allows no other."""


def test_aiormq_is_the_version_that_was_read() -> None:
    major, minor, *_ = version("aiormq").split(".")

    assert (int(major), int(minor)) == READ


@pytest.mark.parametrize("name", ["_on_confirm_frame", "_on_return_frame"])
def test_channel_hands_frames_to_the_method_that_is_overridden(name: str) -> None:
    method = getattr(Channel, name, None)

    assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(method).parameters) == ["self", "frame"]
    assert any(name in _names(reader) for reader in vars(Channel).values() if inspect.iscoroutinefunction(reader))


def test_channel_gives_its_frames_one_by_one() -> None:
    assert inspect.iscoroutinefunction(getattr(Channel, "_get_frame", None))
    assert list(inspect.signature(Channel._get_frame).parameters) == ["self"]


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (amqp._Outlet, "_on_confirm_frame"),
        (amqp._Outlet, "_on_return_frame"),
    ],
)
def test_our_channels_override_it(ours: type[Channel], name: str) -> None:
    assert issubclass(ours, Channel)
    assert name in vars(ours)


def test_connection_puts_frames_into_what_the_channel_has_for_them() -> None:
    """`Deliveries` takes messages there. The method is private: when it goes, this test says so, and that is what it is for."""
    assert "put" in _names(Connection._Connection__reader) and "frames" in _names(Connection._Connection__reader)  # type: ignore[attr-defined]
    assert "frames" in _names(Channel._get_frame)


def test_connection_asks_its_reader_for_exact_numbers_of_bytes_and_for_the_end() -> None:
    """`_Reader` has these; `read` is for a frame that there is none of."""
    asked = _names(FrameReceiver.get_frame) & {name for name in vars(asyncio.StreamReader) if not name.startswith("_")}

    assert asked == {"readexactly", "at_eof", "read"}


def test_connection_keeps_channels_by_their_numbers() -> None:
    """`Live.add` puts ours among them."""
    assert "channels" in inspect.get_annotations(Connection)
    assert list(inspect.signature(Channel.__init__).parameters)[1:3] == ["connector", "number"]


def _names(function: object) -> set[str]:
    """What a function's code names, in its inner functions as well."""
    found: set[str] = set()
    waiting = [code] if inspect.iscode(code := getattr(function, "__code__", None)) else []
    while waiting:
        code = waiting.pop()
        found.update(code.co_names)
        waiting += [one for one in code.co_consts if inspect.iscode(one)]
    return found
