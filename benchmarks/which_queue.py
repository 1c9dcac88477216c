"""`make bench-brokers`: the page of `kassa bench brokers`, on real servers of the project's own, kills included.

    python -m benchmarks.which_queue [--quick] [--out FILE] [OPTION of kassa bench brokers …]

It starts RabbitMQ, Kafka and RocketMQ in a temporary directory, and gives the command what a user would give it: URLs, and
commands that kill and start each server. A server that this machine cannot have is named, and the others are measured.
"""

import contextlib
import shlex
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kassa.db import embedded
from servers import KINDS, Server, ServerFailed, ServerUnavailable, install

SCHEMES = {"rabbitmq": "amqp", "kafka": "kafka", "rocketmq": "rocketmq"}
OUT = "kassa-brokers.html"


def main() -> None:
    """As the command of the same name; and, for its kills: `kill DIR NAME`, `start DIR NAME`."""
    match sys.argv[1:]:
        case ["kill", directory, name]:
            server_in(Path(directory), name).kill()
        case ["start", directory, name]:
            server_in(Path(directory), name).start()
        case options:
            # Ended from outside, it stops what it started, as after Ctrl-C.
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            sys.exit(measure(options))


def server_in(directory: Path, name: str) -> Server:
    """The server whose data is there; it stays when this process ends, since another one looks after it."""
    return KINDS[name](directory / name, outlives_us=True)


def measure(options: list[str]) -> int:
    """Starts what can be had, measures, and stops it again."""
    with embedded.temporary_directory("kassa-bench-brokers-") as directory:
        with ThreadPoolExecutor() as pool:
            begun = {name: pool.submit(_started, directory, name) for name in KINDS}
        names = [name for name, future in begun.items() if future.result()]
        try:
            return subprocess.run([*_command(directory, names), *options], check=False).returncode
        except KeyboardInterrupt:
            return 1
        finally:
            for name in names:
                # Its data goes too, so there is nothing that it should save first.
                server_in(directory, name).kill()


def _started(directory: Path, name: str) -> bool:
    try:
        install(name)
        server_in(directory, name).start()
    except (ServerUnavailable, ServerFailed) as error:
        print(f"{name} is not measured: {error}", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            server_in(directory, name).kill()
        return False
    return True


def _command(directory: Path, names: list[str]) -> list[str]:
    versions = tomllib.loads((Path(__file__).parents[1] / "servers" / "versions.toml").read_text())
    command = [sys.executable, "-m", "kassa.cli.main", "bench", "brokers", "--broker", "postgres", "--broker", "zeromq"]
    for name in names:
        server = server_in(directory, name)
        command += ["--broker", server.url]
        # RabbitMQ says its own.
        if version := versions.get(name, {}).get("version"):
            command += ["--about", f"{name}={KINDS[name].__name__} {version}"]
        for option, verb in (("--kill-command", "kill"), ("--start-command", "start")):
            order = shlex.join([sys.executable, "-m", "benchmarks.which_queue", verb, str(directory), name])
            command += [option, f"{name}={order}"]
    return command


if __name__ == "__main__":
    main()
