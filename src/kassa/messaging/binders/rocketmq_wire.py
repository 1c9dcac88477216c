"""What Kassa speaks with RocketMQ 5: seven calls over gRPC to its proxy, and questions to its name server and brokers.

The messages are described here and not taken from `rocketmq-python-client`: importing its stubs loads the whole client with
OpenTelemetry, makes a folder in the home directory and configures logging. The descriptions have a pool of their own, so that
both may be in one process. Fields that are not described are not lost on anybody: protobuf passes over them.

Sources: apache/rocketmq-apis 2.1 `apache/rocketmq/v2/{definition,service}.proto`; RocketMQ 5.5.0 remoting/protocol
(RemotingCommand, RequestCode, ResponseCode) and acl/common/AclUtils.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import grpc.aio
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from kassa.errors import BrokerUnreachable, SettingInvalid
from kassa.ids import new_id
from kassa.settings import without_password

# Settings


class Address(NamedTuple):
    """Where somebody listens."""

    host: str
    port: int


class Server(NamedTuple):
    """What the URL says."""

    shown: str
    """The URL as people may see it."""
    proxy: Address
    name_server: Address | None
    user: str
    password: str
    is_tls: bool
    ca: str | None
    cert: str | None
    key: str | None
    server_name: str | None


def read_url(url: str) -> Server:
    """Raises SettingInvalid, which names the URL without its password."""
    shown = without_password(url)
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))

    def refuse(why: str) -> SettingInvalid:
        return SettingInvalid(f"{shown}: {why}", broker="rocketmq")

    try:
        proxy = Address(parts.hostname or "", parts.port or 8081)
    except ValueError as error:
        raise refuse(f"{error}.") from None
    if not proxy.host:
        raise refuse("a host is missing, as in rocketmq://127.0.0.1:8081?namesrv=127.0.0.1:9876.")
    name_server = None
    if place := given.pop("namesrv", None):
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal():
            raise refuse("namesrv is HOST:PORT of the name server.")
        name_server = Address(host.strip("[]"), int(port))
    tls = given.pop("tls", "0")
    if tls not in ("0", "1"):
        raise refuse("tls is 0 or 1.")
    server = Server(
        shown, proxy, name_server, unquote(parts.username or ""), unquote(parts.password or ""), tls == "1",
        given.pop("ca", None), given.pop("cert", None), given.pop("key", None), given.pop("server_name", None),
    )  # fmt: skip
    if given:
        raise refuse(f"nobody knows {', '.join(sorted(given))} here.")
    if not server.is_tls and (server.ca or server.cert or server.key or server.server_name):
        raise refuse("ca, cert, key and server_name are for tls=1.")
    return server


# Messages of the proxy's protocol

_SCHEMA = """
Timestamp: 1 int64 seconds, 2 int32 nanos
Duration: 1 int64 seconds, 2 int32 nanos
Status: 1 int32 code, 2 string message
Resource: 1 string resource_namespace, 2 string name
Address: 1 string host, 2 int32 port
Endpoints: 1 int32 scheme, 2 Address[] addresses
Broker: 1 string name, 2 int32 id, 3 Endpoints endpoints
MessageQueue: 1 Resource topic, 2 int32 id, 3 int32 permission, 4 Broker broker, 5 int32[] accept_message_types
SystemProperties: 1 string tag, 2 string[] keys, 3 string message_id, 5 int32 body_encoding, 6 int32 message_type,
    7 Timestamp born_timestamp, 8 string born_host, 9 Timestamp store_timestamp, 12 string receipt_handle, 13 int32 queue_id,
    14 int64 queue_offset, 16 int32 delivery_attempt, 17 string message_group
Message: 1 Resource topic, 2 map user_properties, 3 SystemProperties system_properties, 4 bytes body
FilterExpression: 1 int32 type, 2 string expression
SubscriptionEntry: 1 Resource topic, 2 FilterExpression expression
Subscription: 1 Resource group, 2 SubscriptionEntry[] subscriptions, 3 bool fifo, 5 Duration long_polling_timeout
UA: 1 int32 language, 2 string version, 3 string platform, 4 string hostname
Settings: 1 int32 client_type, 6 Subscription subscription, 7 UA user_agent
TelemetryCommand: 1 Status status, 2 Settings settings
QueryRouteRequest: 1 Resource topic, 2 Endpoints endpoints
QueryRouteResponse: 1 Status status, 2 MessageQueue[] message_queues
SendMessageRequest: 1 Message[] messages
SendResultEntry: 1 Status status, 2 string message_id
SendMessageResponse: 1 Status status, 2 SendResultEntry[] entries
ReceiveMessageRequest: 1 Resource group, 2 MessageQueue message_queue, 3 FilterExpression filter_expression,
    4 int32 batch_size, 5 Duration invisible_duration, 6 bool auto_renew, 7 Duration long_polling_timeout, 8 string attempt_id
ReceiveMessageResponse: 1 Status status, 2 Message message
AckMessageEntry: 1 string message_id, 2 string receipt_handle
AckMessageRequest: 1 Resource group, 2 Resource topic, 3 AckMessageEntry[] entries
AckMessageResultEntry: 1 string message_id, 2 string receipt_handle, 3 Status status
AckMessageResponse: 1 Status status, 2 AckMessageResultEntry[] entries
ChangeInvisibleDurationRequest: 1 Resource group, 2 Resource topic, 3 string receipt_handle, 4 Duration invisible_duration,
    5 string message_id
ChangeInvisibleDurationResponse: 1 Status status, 2 string receipt_handle
HeartbeatRequest: 1 Resource group, 2 int32 client_type
HeartbeatResponse: 1 Status status
"""
"""`Message: number type name, …`; an enumeration is an int32, and a field of a `oneof` looks like any other on the wire."""
_SCALARS = {
    "int32": FieldDescriptorProto.TYPE_INT32,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "bool": FieldDescriptorProto.TYPE_BOOL,
}
_PACKAGE = "kassa.rocketmq"


def _described() -> FileDescriptorProto:
    file = FileDescriptorProto(name="kassa/rocketmq.proto", package=_PACKAGE, syntax="proto3")
    for line in _SCHEMA.replace("\n    ", " ").strip().splitlines():
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for number, kind, field_name in (field.split() for field in fields.split(",")):
            field = message.field.add(name=field_name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
            if kind.endswith("[]") or kind == "map":
                field.label = FieldDescriptorProto.LABEL_REPEATED
            plain = kind.removesuffix("[]")
            if kind == "map":
                entry = message.nested_type.add(name="UserPropertiesEntry")
                entry.options.map_entry = True
                for place, part in enumerate(("key", "value"), 1):
                    entry.field.add(
                        name=part, number=place, type=_SCALARS["string"], label=FieldDescriptorProto.LABEL_OPTIONAL
                    )
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{name}.{entry.name}"
            elif plain in _SCALARS:
                field.type = _SCALARS[plain]
            else:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{plain}"
    return file


def _classes() -> dict[str, Any]:
    pool = DescriptorPool()
    file = pool.AddSerializedFile(_described().SerializeToString()) or pool.FindFileByName("kassa/rocketmq.proto")
    return {name: GetMessageClass(one) for name, one in file.message_types_by_name.items()}


_CLASSES = _classes()


def make(name: str, /, **fields: object) -> Any:
    """A message of the protocol."""
    return _CLASSES[name](**fields)


def resource(name: str) -> Any:
    return _CLASSES["Resource"](name=name)


def duration(seconds: float) -> Any:
    whole, rest = divmod(round(seconds * 1000), 1000)
    return _CLASSES["Duration"](seconds=whole, nanos=rest * 1_000_000)


# Words of the protocol

NORMAL, FIFO = 1, 2
SIMPLE_CONSUMER = 3
IDENTITY, GZIP = 1, 2
TAG = 1

OK = 20000
NOT_FOUND, MESSAGE_NOT_FOUND, TOPIC_NOT_FOUND, GROUP_NOT_FOUND = 40400, 40401, 40402, 40403
ILLEGAL_TOPIC, WRONG_TYPE = 40002, 40014
UNAUTHORIZED, FORBIDDEN = 40100, 40300
TOO_MANY = 42900


# The proxy

VERSION = "5.0.7"
"""Of the official client whose dialect this is."""
BYTES_MAX = 64 * 1024 * 1024
_SERVICE = "/apache.rocketmq.v2.MessagingService/"
_OPTIONS = [
    ("grpc.max_receive_message_length", BYTES_MAX),
    ("grpc.max_send_message_length", BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection of its own for each channel, so that a new channel is a new connection.
    ("grpc.use_local_subchannel_pool", 1),
]


class Channel:
    """One connection to the proxy, with the calls that it takes."""

    def __init__(self, server: Server) -> None:
        target = f"{server.proxy.host}:{server.proxy.port}"
        options: list[tuple[str, Any]] = list(_OPTIONS)
        if server.is_tls:
            if server.server_name:
                options.append(("grpc.ssl_target_name_override", server.server_name))
            self._channel = grpc.aio.secure_channel(target, _credentials(server), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        self.query_route = self._unary("QueryRoute")
        self.send = self._unary("SendMessage")
        self.ack = self._unary("AckMessage")
        self.change = self._unary("ChangeInvisibleDuration")
        self.heartbeat = self._unary("Heartbeat")
        self.receive: Callable[..., Any] = self._channel.unary_stream(
            f"{_SERVICE}ReceiveMessage", **self._codec("ReceiveMessageRequest", "ReceiveMessageResponse")
        )
        self.telemetry: Callable[..., Any] = self._channel.stream_stream(
            f"{_SERVICE}Telemetry", **self._codec("TelemetryCommand", "TelemetryCommand")
        )

    async def ready(self) -> None:
        """Returns once there is a connection."""
        if self._channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            await self._channel.channel_ready()

    async def close(self, grace_s: float | None = None) -> None:
        await self._channel.close(grace_s)

    def _unary(self, name: str) -> Callable[..., Any]:
        return self._channel.unary_unary(f"{_SERVICE}{name}", **self._codec(f"{name}Request", f"{name}Response"))

    def _codec(self, asked: str, answered: str) -> dict[str, Any]:
        return {
            "request_serializer": _CLASSES[asked].SerializeToString,
            "response_deserializer": _CLASSES[answered].FromString,
        }


def _credentials(server: Server) -> grpc.ChannelCredentials:
    try:
        ca, key, cert = (Path(name).read_bytes() if name else None for name in (server.ca, server.key, server.cert))
    except OSError as error:
        raise SettingInvalid(f"{server.shown}: {error}.", broker="rocketmq") from error
    return grpc.ssl_channel_credentials(ca, key, cert)


class Identity:
    """Who calls: the proxy knows clients, and what they subscribe, by this name."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._fixed = (
            ("x-mq-client-id", f"kassa@{new_id()}"),
            ("x-mq-language", "PYTHON"),
            ("x-mq-protocol", "v2"),
            ("x-mq-client-version", VERSION),
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call; signed when the URL has an access key."""
        if not self._server.user:
            return self._fixed
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        signature = hmac.new(self._server.password.encode(), now.encode(), hashlib.sha1).hexdigest()
        return (
            *self._fixed,
            ("x-mq-date-time", now),
            (
                "authorization",
                f"MQv2-HMAC-SHA1 Credential={self._server.user}, SignedHeaders=x-mq-date-time, Signature={signature}",
            ),
        )


# Name server and brokers

UPDATE_TOPIC, UPDATE_GROUP, UPDATE_OFFSET = 17, 200, 15
DELETE_TOPIC, DELETE_GROUP, DELETE_TOPIC_AT_NAME_SERVER = 215, 207, 216
TOPIC_CONFIG, TOPIC_STATS = 351, 202
ALL_GROUPS, CONSUME_STATS = 201, 208
CLUSTER = 106
SUCCESS, NO_TOPIC, NO_GROUP, NO_PERMISSION = 0, 17, 26, 16

ASK_S = 10.0
"""One question."""
_FRAME_BYTES_MAX = 16 * 2**20


class Answer(NamedTuple):
    """What the other side says; code 0 is success."""

    code: int
    remark: str
    body: bytes

    def json(self) -> Any:
        """Its body. Raises ValueError. Keys that are numbers have no quotes there."""
        return json.loads(re.sub(rb"([{,])(\d+):", rb'\1"\2":', self.body) or b"{}")


async def ask(
    server: Server, place: Address, code: int, fields: Mapping[str, str] | None = None, body: bytes = b""
) -> Answer:
    """One question over a connection of its own. Raises BrokerUnreachable."""
    sent = dict(fields or {})
    if server.user:
        sent["AccessKey"] = server.user
        signed = "".join(sent[name] for name in sorted(sent)).encode() + body
        sent["Signature"] = base64.b64encode(hmac.new(server.password.encode(), signed, hashlib.sha1).digest()).decode()
    head = json.dumps({
        "code": code, "language": "PYTHON", "version": 495, "opaque": 1, "flag": 0, "extFields": sent,
        "serializeTypeCurrentRPC": "JSON",
    }).encode()  # fmt: skip
    try:
        async with asyncio.timeout(ASK_S):
            reader, writer = await asyncio.open_connection(*place)
            try:
                writer.write(struct.pack(">II", 4 + len(head) + len(body), len(head)) + head + body)
                await writer.drain()
                (length,) = struct.unpack(">I", await reader.readexactly(4))
                if length > _FRAME_BYTES_MAX:
                    raise BrokerUnreachable(f"{place.host}:{place.port} is no RocketMQ.", broker="rocketmq")
                frame = await reader.readexactly(length)
            finally:
                writer.close()
    # A name server may name a place that nobody can go to.
    except (OSError, TimeoutError, EOFError, ValueError, OverflowError) as error:
        raise BrokerUnreachable(
            f"RocketMQ at {place.host}:{place.port} cannot be reached: {error or 'no answer'}.", broker="rocketmq"
        ) from error
    try:
        head_length = struct.unpack(">I", frame[:4])[0] & 0xFFFFFF
        answer = json.loads(frame[4 : 4 + head_length])
        return Answer(answer["code"], answer.get("remark") or "", frame[4 + head_length :])
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise BrokerUnreachable(f"{place.host}:{place.port} is no RocketMQ.", broker="rocketmq") from error
