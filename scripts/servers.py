"""Print the servers that Kassa's tests and benchmarks would use on this machine."""

from pathlib import Path
from tempfile import TemporaryDirectory

from kassa.db.account import server_account
from kassa.db.binaries import find_binaries, newest_of_debian


def main() -> None:
    """One line for each server."""
    account = server_account(None)
    with TemporaryDirectory() as place:
        binaries, _ = find_binaries(account, Path(place))
    print(f"PostgreSQL {binaries.version}, embedded: {binaries.bin}, runs as {account.name}")
    print(f"PostgreSQL of Debian: {newest_of_debian() or 'not installed'}")


if __name__ == "__main__":
    main()
