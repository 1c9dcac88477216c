"""Apache RocketMQ 5 from its jars: a name server, and a proxy with the broker inside it.

The proxy listens on every address for clients and for replicas; no setting of 5.5 changes that.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from servers import installation, remoting
from servers.errors import ServerFailed
from servers.server import HOST, Server

_NAME_SERVER_HEAP = "64m"
_PROXY_HEAP = "320m"
_PROXY_DIRECT_MEMORY = "256m"
_BROKER = "broker-a"
_CLUSTER = "DefaultCluster"
_READY_TOPIC = "ready"
"""Made at each start, to see that a topic can be."""
_QUERY_TIMEOUT_S = 5.0
_QUEUES = 8

_BROKER_SETTINGS = """
brokerClusterName={cluster}
brokerName={broker}
brokerId=0
brokerIP1={host}
bindAddress={host}
listenPort={broker_port}
haListenPort={replica_port}
namesrvAddr={host}:{name_server_port}
storePathRootDir={store}
storePathCommitLog={store}/commitlog
mappedFileSizeCommitLog=67108864
mappedFileSizeTimerLog=16777216
maxHashSlotNum=50000
maxIndexNum=200000
flushDiskType=SYNC_FLUSH
brokerRole=ASYNC_MASTER
diskMaxUsedSpaceRatio=95
autoCreateTopicEnable=false
# By default a delay of 2.5 s arrives after 3.3 s. Without its timers (timerWheelEnable) nothing can be received at all.
timerPrecisionMs=100
recallMessageEnable=true
# Redelivery half a second late instead of two to five.
popConsumerKVServiceInit=true
popConsumerKVServiceEnable=true
# By default a thread spins for ten seconds after the start.
transactionMetricFlushInterval=1000
"""


class RocketMQ(Server):
    """A name server and a proxy. `kill` loses the acknowledgements of the last five seconds: they come again."""

    name = "rocketmq"
    PORTS = ("grpc", "remoting", "name_server", "broker", "replica")

    @property
    def url(self) -> str:
        """The proxy's gRPC port; the name server for whoever makes topics."""
        return f"rocketmq://{HOST}:{self.port('grpc')}?namesrv={HOST}:{self.port('name_server')}"

    @property
    def endpoint(self) -> str:
        """Of the proxy, for a gRPC client."""
        return f"{HOST}:{self.port('grpc')}"

    def make_topic(self, name: str, *, kind: str = "NORMAL", queues: int = _QUEUES) -> None:
        """Make a topic, or change it, and wait until the name server knows it.

        kind: NORMAL, FIFO, DELAY, TRANSACTION or PRIORITY.
        Raises ServerFailed with the broker's words.
        """
        self._tell_broker(
            remoting.UPDATE_TOPIC,
            {
                "topic": name,
                "defaultTopic": "TBW102",
                "readQueueNums": str(queues),
                "writeQueueNums": str(queues),
                "perm": "6",
                "topicFilterType": "SINGLE_TAG",
                "topicSysFlag": "0",
                "order": "false",
                "attributes": f"+message.type={kind}",
            },
        )
        self._await(f"know the topic {name}", lambda: self._has_route(name))

    def make_group(self, name: str, *, is_orderly: bool = False, retries_max: int = 16) -> None:
        """Make a consumer group, or change it. Raises ServerFailed with the broker's words."""
        settings = {
            "groupName": name,
            "consumeEnable": True,
            "consumeFromMinEnable": True,
            "consumeBroadcastEnable": False,
            "consumeMessageOrderly": is_orderly,
            "retryQueueNums": 1,
            "retryMaxTimes": retries_max,
            "brokerId": 0,
            "whichBrokerWhenConsumeSlowly": 1,
            "notifyConsumerIdsChangedEnable": True,
        }
        self._tell_broker(remoting.UPDATE_GROUP, {}, json.dumps(settings).encode())

    def _launch(self) -> None:
        name_server_settings, broker_settings, proxy_settings = self._configure()
        name_server: list[str | Path] = ["org.apache.rocketmq.namesrv.NamesrvStartup", "-c", name_server_settings]
        bounds = [f"-Xms{_NAME_SERVER_HEAP}", f"-Xmx{_NAME_SERVER_HEAP}"]
        self._spawn_java("name_server", bounds, name_server)
        self._await_port("name_server")
        proxy: list[str | Path] = ["org.apache.rocketmq.proxy.ProxyStartup", "-pm", "local"]
        proxy += ["-n", f"{HOST}:{self.port('name_server')}", "-bc", broker_settings, "-pc", proxy_settings]
        bounds = [f"-Xms{_PROXY_HEAP}", f"-Xmx{_PROXY_HEAP}", f"-XX:MaxDirectMemorySize={_PROXY_DIRECT_MEMORY}"]
        self._spawn_java(self.name, bounds, proxy)
        self._await_port("grpc")
        self._await("know its broker", self._is_registered)
        self.make_topic(_READY_TOPIC)
        self._await("answer over gRPC", self._proxy_has_route)

    def _spawn_java(self, role: str, bounds: Sequence[str], program: Sequence[str | Path]) -> None:
        places = [f"-Djava.io.tmpdir={self._folder('tmp')}", f"-Duser.home={self.directory}"]
        # Else each part makes a key and a certificate of its own at every start, which is half of what a start costs.
        safety = ["-Dtls.server.mode=disabled", "-Dtls.test.mode.enable=false"]
        # Compiled soon rather than well, like Kafka: a start takes two thirds of the processor time.
        speed = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData"]
        common = [*speed, *safety, *places, "-cp", f"{installation.jars(self.name)}/*"]
        environment = {"ROCKETMQ_HOME": str(self.directory)}
        self._spawn(role, [installation.java(), *bounds, *common, *program], environment)

    def _configure(self) -> tuple[Path, Path, Path]:
        name_server = f"listenPort={self.port('name_server')}\nbindAddress={HOST}\n"
        broker = _BROKER_SETTINGS.format(
            cluster=_CLUSTER,
            broker=_BROKER,
            host=HOST,
            broker_port=self.port("broker"),
            replica_port=self.port("replica"),
            name_server_port=self.port("name_server"),
            store=self._folder("store"),
        )
        proxy = {
            "rocketMQClusterName": _CLUSTER,
            "namesrvAddr": f"{HOST}:{self.port('name_server')}",
            "grpcServerPort": self.port("grpc"),
            "remotingListenPort": self.port("remoting"),
            "enableBatchAck": True,
            # Clients of gRPC choose whether they want TLS.
            "tlsTestModeEnable": False,
            "tlsCertPath": str(self.certificates.server),
            "tlsKeyPath": str(self.certificates.key),
            # A topic that has just been made is seen at once, and not after twenty seconds.
            "topicRouteServiceCacheRefreshSeconds": 1,
            "topicConfigCacheRefreshSeconds": 1,
            "subscriptionGroupConfigCacheRefreshSeconds": 1,
            "minInvisibleTimeMillsForRecv": 1000,
            "grpcClientConsumerMinLongPollingTimeoutMillis": 500,
        }
        return (
            self._write("conf/namesrv.conf", name_server),
            self._write("conf/broker.conf", broker),
            self._write("conf/rmq-proxy.json", json.dumps(proxy)),
        )

    # Whether it is ready

    def _is_registered(self) -> bool:
        """Whether the name server knows the broker; the broker is asked to tell it, which it mostly forgets at first."""
        if f'"{_BROKER}"'.encode() in self._ask_name_server(remoting.BROKER_CLUSTERS).body:
            return True
        self._tell_broker(remoting.UPDATE_BROKER_CONFIG, {}, b"brokerPermission=6\n")
        return False

    def _has_route(self, topic: str) -> bool:
        return self._ask_name_server(remoting.ROUTE_OF_TOPIC, {"topic": topic}).code == 0

    def _proxy_has_route(self) -> bool:
        """QueryRoute by hand: stubs for one question would keep others from loading their own in this process."""
        topic = _field(1, _field(2, _READY_TOPIC.encode()))
        address = _field(1, HOST.encode()) + b"\x10" + _varint(self.port("grpc"))
        endpoints = _field(2, b"\x08\x01" + _field(2, address))
        with grpc.insecure_channel(self.endpoint) as channel:
            query: Callable[..., bytes] = channel.unary_unary("/apache.rocketmq.v2.MessagingService/QueryRoute")
            try:
                answer = query(topic + endpoints, timeout=_QUERY_TIMEOUT_S, metadata=_METADATA)
            except grpc.RpcError:
                return False
        # The first field is the status, whose first field is its code: OK is 20000.
        return answer[2:].startswith(b"\x08" + _varint(20_000))

    def _ask_name_server(self, code: int, fields: dict[str, str] | None = None) -> remoting.Answer:
        return remoting.ask(HOST, self.port("name_server"), code, fields)

    def _tell_broker(self, code: int, fields: dict[str, str], body: bytes = b"") -> None:
        answer = remoting.ask(HOST, self.port("broker"), code, fields, body)
        if answer.code != 0:
            raise ServerFailed(self.name, f"refused request {code}: {answer.remark}")


_METADATA = (
    ("x-mq-client-id", "kassa-servers"),
    ("x-mq-language", "PYTHON"),
    ("x-mq-protocol", "v2"),
    ("x-mq-client-version", "5.0.0"),
)


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf with bytes in it."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
