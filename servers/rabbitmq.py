"""RabbitMQ from Debian: one node with its own epmd, a plain and a TLS listener, and alarms on demand."""

import secrets
import socket
from collections.abc import Mapping

from servers import installation
from servers.server import HOST, Server

_NODE = "kassa@localhost"
_MEMORY_MAX = "512MB"
_LOG_BYTES_MAX = 64 * 1024 * 1024
"""Quorum queues keep in memory what their log's newest file has. As it comes that is 512 MB, and at the limit above nobody may
publish what would fill the file: the alarm would stand for ever, with all queues empty."""
_DISK_FREE_MIN = "100MB"
_GREETING = b"AMQP\x00\x00\x09\x01"
"""The protocol header of AMQP 0-9-1; a server that is ready answers with its first frame."""

_ALARM = """
    Wait = fun Wait(0) -> error(no_change);
               Wait(N) -> case lists:keymember({{resource_limit, {kind}, node()}}, 1, rabbit_alarm:get_alarms()) of
                              {wanted} -> ok;
                              _ -> timer:sleep(50), Wait(N - 1)
                          end
           end,
    {change}, Wait(1200)
"""


class RabbitMQ(Server):
    """A node with one user, who may do everything in every virtual host of ours.

    What was declared last may be gone when it is killed within two seconds of that: RabbitMQ 3.10 answers before Mnesia's decision
    about it is in the log, where the next declaration brings it. Quorum queues fare no better.
    """

    name = "rabbitmq"
    PORTS = ("amqp", "amqps", "epmd", "distribution")

    @property
    def url(self) -> str:
        """The default virtual host, without TLS."""
        return f"amqp://{self.username}:{self.password}@{HOST}:{self.port('amqp')}/"

    @property
    def tls_url(self) -> str:
        """The default virtual host, over TLS."""
        return f"amqps://{self.username}:{self.password}@{HOST}:{self.port('amqps')}/"

    def virtual_host(self, name: str) -> str:
        """Make a virtual host, if there is none of that name, and give its URL. Takes half a second.

        name: letters, digits, `_` and `-`.
        """
        self.evaluate(
            f'rabbit_vhost:add(<<"{name}">>, <<"{self.username}">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"{self.username}">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"{self.username}">>)'
        )
        return f"{self.url}{name}"

    def raise_memory_alarm(self) -> None:
        """Take all memory for granted: the node blocks every publisher until `clear_memory_alarm`."""
        self._alarm("memory", is_on=True, change="vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1})")

    def clear_memory_alarm(self) -> None:
        """Go back to the usual limit."""
        limit = f'vm_memory_monitor:set_vm_memory_high_watermark({{absolute, "{_MEMORY_MAX}"}})'
        self._alarm("memory", is_on=False, change=limit)

    def raise_disk_alarm(self) -> None:
        """Demand more free disk than there is: the node blocks every publisher until `clear_disk_alarm`."""
        self._alarm("disk", is_on=True, change='rabbit_disk_monitor:set_disk_free_limit("1000000GB")')

    def clear_disk_alarm(self) -> None:
        """Go back to the usual limit."""
        self._alarm("disk", is_on=False, change=f'rabbit_disk_monitor:set_disk_free_limit("{_DISK_FREE_MIN}")')

    def control(self, *command: str) -> str:
        """What `rabbitmqctl` answers; it takes some seconds of CPU for each call, so prefer `evaluate`.

        Raises ServerFailed with its own words.
        """
        return self._run([installation.rabbitmq() / "rabbitmqctl", "-q", *command], self._environment())

    def evaluate(self, expression: str) -> str:
        """The value of an Erlang expression on the node, as Erlang prints it; without the seconds of `rabbitmqctl`.

        Raises ServerFailed with the node's own words.
        """
        remote = (
            '{ok, Tokens, _} = erl_scan:string(os:getenv("EXPRESSION") ++ "."), '
            "{ok, Parsed} = erl_parse:parse_exprs(Tokens), "
            f"case rpc:call('{_NODE}', erl_eval, exprs, [Parsed, []]) of "
            '{value, Value, _} -> io:format("~tp", [Value]), halt(0); '
            'Failed -> io:format("~tp", [Failed]), halt(1) end.'
        )
        own_name = f"asks_{secrets.token_hex(6)}@localhost"
        command = ["erl", "-noinput", "-hidden", "-sname", own_name, "-start_epmd", "false", "-eval", remote]
        loopback = ["-kernel", "inet_dist_use_interface", "{127,0,0,1}"]
        return self._run([*command, *loopback], {**self._environment(), "EXPRESSION": expression})

    def _alarm(self, kind: str, *, is_on: bool, change: str) -> None:
        self.evaluate(_ALARM.format(kind=kind, wanted=str(is_on).lower(), change=change))

    def _launch(self) -> None:
        programs = installation.rabbitmq()
        # Found listening, it is not started a second time by Erlang itself, out of our sight.
        self._spawn("epmd", ["epmd", "-address", HOST, "-port", str(self.port("epmd"))], {})
        self._await_port("epmd")
        self._configure()
        self._spawn("rabbitmq", [programs / "rabbitmq-server"], self._environment(), log=self.log)
        self._await("greet", self._greets)

    def _configure(self) -> None:
        # Erlang's nodes know each other by it, and it refuses one that others may read.
        if not (cookie := self.directory / ".erlang.cookie").exists():
            self._write(cookie.name, secrets.token_hex(20), mode=0o400)
        self._write("enabled_plugins", "[].\n")
        self._write("environment", "")
        self._write(
            "rabbitmq.conf",
            "\n".join(
                [
                    f"listeners.tcp.1 = {HOST}:{self.port('amqp')}",
                    f"listeners.ssl.1 = {HOST}:{self.port('amqps')}",
                    f"ssl_options.cacertfile = {self.certificates.authority}",
                    f"ssl_options.certfile = {self.certificates.server}",
                    f"ssl_options.keyfile = {self.certificates.key}",
                    "ssl_options.verify = verify_none",
                    "ssl_options.fail_if_no_peer_cert = false",
                    f"default_user = {self.username}",
                    f"default_pass = {self.password}",
                    "log.console = true",
                    "log.file = false",
                    f"vm_memory_high_watermark.absolute = {_MEMORY_MAX}",
                    f"raft.wal_max_size_bytes = {_LOG_BYTES_MAX}",
                    f"disk_free_limit.absolute = {_DISK_FREE_MIN}",
                    "",
                ]
            ),
        )

    def _environment(self) -> Mapping[str, str]:
        return {
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self.port("epmd")),
            "RABBITMQ_NODENAME": _NODE,
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "environment"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._folder("data")),
            "RABBITMQ_LOG_BASE": str(self._folder("logs")),
            "RABBITMQ_PID_FILE": str(self.directory / "pid"),
            "RABBITMQ_DIST_PORT": str(self.port("distribution")),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 2:2 +sbwt none -kernel inet_dist_use_interface {127,0,0,1} -start_epmd false"
            ),
        }

    def _greets(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port("amqp")), timeout=1) as connection:
                connection.sendall(_GREETING)
                return connection.recv(1) == b"\x01"
        except OSError:
            return False
