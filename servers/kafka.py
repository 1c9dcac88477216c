"""Apache Kafka from its jars: one KRaft node, broker and controller in one, with a plain and a SASL_SSL listener."""

import base64
import secrets
from pathlib import Path

from servers import installation
from servers.server import HOST, Server

_HEAP = "256m"
_FORMAT_HEAP = "128m"

_SETTINGS = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{plain},SASL_SSL://{host}:{tls},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{plain},SASL_SSL://{host}:{tls}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL
inter.broker.listener.name=PLAINTEXT
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{user}="{password}";
log.dirs={data}
# One node has nowhere to copy to.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
log.segment.bytes=67108864
auto.create.topics.enable=false
# After a SIGKILL the broker may come back only when its old session has ended, which takes 9 s by default.
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=2000
"""

_LOGGING = """
status=error
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d %p %m (%c)%n
rootLogger.level=info
rootLogger.appenderRef.console.ref=console
"""


class Kafka(Server):
    """A node that makes no topic unasked. Its user may sign in by SCRAM-SHA-512 or PLAIN."""

    name = "kafka"
    PORTS = ("plain", "tls", "controller")

    @property
    def url(self) -> str:
        """Without TLS, for anybody."""
        return f"kafka://{self.bootstrap}"

    @property
    def tls_url(self) -> str:
        """Over TLS, with user and password."""
        return f"kafka+ssl://{self.username}:{self.password}@{self.tls_bootstrap}"

    @property
    def bootstrap(self) -> str:
        """`bootstrap.servers` of a client that speaks PLAINTEXT."""
        return f"{HOST}:{self.port('plain')}"

    @property
    def tls_bootstrap(self) -> str:
        """`bootstrap.servers` of a client that speaks SASL_SSL."""
        return f"{HOST}:{self.port('tls')}"

    def _launch(self) -> None:
        libraries = f"{installation.jars('kafka')}/*"
        settings = self._configure()
        if not (self.directory / "data" / "meta.properties").exists():
            self._format(libraries, settings)
        # The cheapest compiler only: a short life gains nothing by the other, which takes half a core for a minute.
        bounds = [f"-Xms{_HEAP}", f"-Xmx{_HEAP}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
        logging = f"-Dlog4j2.configurationFile={self.directory / 'log4j2.properties'}"
        command: list[str | Path] = [
            installation.java(),
            *bounds,
            "-Djava.awt.headless=true",
            logging,
            "-cp",
            libraries,
        ]
        self._spawn("kafka", [*command, "kafka.Kafka", settings], {}, log=self.log)
        self._await_port("plain")
        self._await_port("tls")

    def _configure(self) -> str:
        self._write("log4j2.properties", _LOGGING)
        settings = _SETTINGS.format(
            host=HOST,
            **{name: self.port(name) for name in self.PORTS},
            keystore=self.certificates.server_with_key,
            user=self.username,
            password=self.password,
            data=self._folder("data"),
        )
        return str(self._write("server.properties", settings))

    def _format(self, libraries: str, settings: str) -> None:
        """Make the data directory, with the user in it."""
        identity = base64.urlsafe_b64encode(secrets.token_bytes(16)).rstrip(b"=").decode()
        user = f"SCRAM-SHA-512=[name={self.username},password={self.password}]"
        logging = f"-Dlog4j2.configurationFile={self.directory / 'log4j2.properties'}"
        program: list[str | Path] = [
            installation.java(),
            f"-Xmx{_FORMAT_HEAP}",
            "-XX:+UseSerialGC",
            "-XX:-UsePerfData",
            logging,
        ]
        format_it = [
            "kafka.tools.StorageTool",
            "format",
            f"--cluster-id={identity}",
            "-c",
            settings,
            "--add-scram",
            user,
        ]
        self._run([*program, "-cp", libraries, *format_it], {})
