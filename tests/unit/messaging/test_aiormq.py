"""What our channels take of aiormq that is not public is there, as it was when they were written.

When this fails after an upgrade: read aiormq's `channel.py` again and see whether `_Outlet` (amqp.py) and `_LaneChannel`
(rabbitmq.py) still do what its own methods of these names do; then widen the version in pyproject.toml.
"""

import inspect
from importlib.metadata import version

import pytest
from aiormq.channel import Channel
from aiormq.connection import Connection

from kassa.messaging.binders import amqp, rabbitmq

READ = (7, 2)
"""The minor version whose source was read; pyproject.toml allows no other."""


def test_aiormq_is_the_version_that_was_read() -> None:
    major, minor, *_ = version("aiormq").split(".")

    assert (int(major), int(minor)) == READ


@pytest.mark.parametrize("name", ["_on_deliver_frame", "_on_confirm_frame", "_on_return_frame"])
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
        (rabbitmq._LaneChannel, "_on_deliver_frame"),
        (amqp._Outlet, "_on_confirm_frame"),
        (amqp._Outlet, "_on_return_frame"),
    ],
)
def test_our_channels_override_it(ours: type[Channel], name: str) -> None:
    assert issubclass(ours, Channel)
    assert name in vars(ours)


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
