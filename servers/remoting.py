"""RocketMQ's own protocol between its parts, as far as starting a broker and making a topic need it. It blocks.

A frame: length of what follows, length of the header with 0 (JSON) in its first byte, header, body; both big-endian.
Source: RocketMQ 5.5.0, remoting/protocol/RemotingCommand and RequestCode.
"""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from servers.errors import ServerFailed

UPDATE_TOPIC = 17
UPDATE_BROKER_CONFIG = 25
BROKER_CLUSTERS = 106
ROUTE_OF_TOPIC = 105
UPDATE_GROUP = 200

_VERSION = 495
_TIMEOUT_S = 10.0
_FRAME_BYTES_MAX = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    """What the other side says; code 0 is success."""

    code: int
    remark: str
    body: bytes


def ask(host: str, port: int, code: int, fields: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
    """One question over a connection of its own. Raises OSError when nobody answers, ServerFailed for nonsense."""
    header = {
        "code": code,
        "language": "PYTHON",
        "version": _VERSION,
        "opaque": 1,
        "flag": 0,
        "extFields": dict(fields or {}),
        "serializeTypeCurrentRPC": "JSON",
    }
    head = json.dumps(header).encode()
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as connection:
        connection.sendall(struct.pack(">II", 4 + len(head) + len(body), len(head)) + head + body)
        (length,) = struct.unpack(">I", _read(connection, 4))
        if length > _FRAME_BYTES_MAX:
            raise ServerFailed("rocketmq", f"sent a frame of {length} bytes")
        frame = _read(connection, length)
    head_length = struct.unpack(">I", frame[:4])[0] & 0xFFFFFF
    answer: dict[str, Any] = json.loads(frame[4 : 4 + head_length])
    return Answer(answer["code"], answer.get("remark") or "", frame[4 + head_length :])


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        if not more:
            raise ConnectionError("closed in the middle of an answer")
        found += more
    return found
