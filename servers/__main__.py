"""Real servers on this machine, for tests, benchmarks and looking around.

    python -m servers install [NAME…]          what is needed to start them
    python -m servers start [NAME…] [--dir DIR] [--json]
    python -m servers status [--json]
    python -m servers stop [NAME…]             their data stays

NAME is rabbitmq, kafka or rocketmq; all of them unless told. They run until `stop`, each with data of its own.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kassa.db.account import server_account
from kassa.db.binaries import find_binaries, newest_of_debian
from servers import installation, kept
from servers.errors import ServerFailed, ServerUnavailable
from servers.kept import KINDS
from servers.server import Server


def main() -> None:
    """Exit status 1 when something that was asked for cannot be had; the rest is done all the same."""
    options = _options()
    names = options.names or list(KINDS)
    match options.command:
        case "install":
            failed = _install(names)
        case "start":
            failed = _install(names)
            missing = {name for name, _ in failed}
            with installation.locked(installation.home() / "lock"):
                failed += _start([name for name in names if name not in missing], options.dir)
            _tell(options.json)
        case "stop":
            failed = []
            with installation.locked(installation.home() / "lock"):
                _stop(names)
        case _:
            failed = []
            _tell(options.json)
    for name, why in failed:
        print(f"{name}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m servers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("install", "start", "stop", "status"):
        command = commands.add_parser(name)
        command.set_defaults(names=[], dir=None, json=False)
        if name != "status":
            command.add_argument("names", nargs="*", metavar="NAME")
        if name == "start":
            command.add_argument("--dir", type=Path, help="where their data is; it must be reachable for their user")
        if name in ("start", "status"):
            command.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - set(KINDS):
        parser.error(f"there is no server {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return options


def _install(names: Iterable[str]) -> list[tuple[str, str]]:
    failed = []
    for name in names:
        try:
            installation.install(name)
        except ServerUnavailable as unavailable:
            failed.append((name, str(unavailable)))
    return failed


def _start(names: list[str], directory: Path | None) -> list[tuple[str, str]]:
    known = {server.name: server for server in kept.kept()}
    base = directory or installation.home() / "data"
    chosen = [known.get(name) or KINDS[name](base / name, outlives_us=True) for name in names]
    failed = []
    # Remembered before they run: whoever interrupts this can still stop them.
    for server in chosen:
        kept.keep(server)
    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        for server, begun in [(server, pool.submit(server.start)) for server in chosen]:
            try:
                begun.result()
            except (ServerFailed, ServerUnavailable) as wrong:
                failed.append((server.name, str(wrong)))
                kept.forget(server)
    return failed


def _stop(names: Iterable[str]) -> None:
    chosen = [server for server in kept.kept() if server.name in names]
    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        list(pool.map(Server.stop, chosen))
    for server in chosen:
        kept.forget(server)
        print(f"{server.name}: stopped; its data is in {server.directory}")


def _tell(as_json: bool) -> None:
    facts = {name: _facts(name) for name in KINDS}
    if as_json:
        print(json.dumps({"postgresql": _postgresql(), **facts}, indent=2))
        return
    postgresql = _postgresql()
    print(f"PostgreSQL {postgresql['version']}, embedded: {postgresql['programs']}, runs as {postgresql['user']}")
    print(f"PostgreSQL of Debian: {postgresql['debian'] or 'not installed'}")
    for name, fact in facts.items():
        if not fact["is_running"]:
            print(f"{name}: {'not running' if fact['is_installed'] else 'not installed'}")
            continue
        print(f"{name}: {fact['url']}")
        if fact["tls_url"]:
            print(f"  over TLS: {fact['tls_url']} (trust {fact['authority']})")
        print(f"  {fact['rss_bytes'] // 2**20} MiB, pids {fact['pids']}, log {fact['log']}")


def _facts(name: str) -> dict[str, Any]:
    server = next((server for server in kept.running() if server.name == name), None)
    if server is None:
        return {"is_running": False, "is_installed": installation.is_installed(name)}
    return {
        "is_running": True,
        "is_installed": True,
        "url": server.url,
        "tls_url": server.tls_url,
        "authority": str(server.certificates.authority) if server.tls_url else None,
        "pids": dict(server.pids),
        "rss_bytes": server.memory().rss_bytes,
        "directory": str(server.directory),
        "log": str(server.log),
    }


def _postgresql() -> dict[str, str | None]:
    account = server_account(None)
    with TemporaryDirectory() as place:
        binaries, _ = find_binaries(account, Path(place))
    debian = newest_of_debian()
    return {
        "version": str(binaries.version),
        "programs": str(binaries.bin),
        "user": account.name,
        "debian": str(debian) if debian else None,
    }


if __name__ == "__main__":
    main()
