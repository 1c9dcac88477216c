"""PostgreSQL of our own, against real servers: made, found, adopted, recovered, and refused with words that help."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from kassa.db import embedded
from kassa.db.account import run_as, server_account
from kassa.db.binaries import find_binaries, newest_of_debian
from kassa.errors import DatabaseRefused, DatabaseUnreachable

IS_ROOT = os.getuid() == 0


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory for one server, which is stopped at the end whoever started it."""
    with embedded.temporary_directory("kassa-one-") as directory:
        yield directory
        kill(directory, signal.SIGINT)


def pid_file(home: Path) -> Path:
    remembered = home / "postgres" / "place"
    base = Path(remembered.read_text().strip()) if remembered.exists() else home / "postgres"
    return base / "data" / "postmaster.pid"


def kill(home: Path, sign: signal.Signals) -> None:
    """Send a signal to the server on `home`, if there is one, and wait for the end of that process."""
    if not pid_file(home).exists():
        return
    pid = int(pid_file(home).read_text().split("\n")[0])
    try:
        os.kill(pid, sign)
        for _ in range(6000):
            os.kill(pid, 0)
            time.sleep(0.01)
    except ProcessLookupError:
        return
    raise AssertionError(f"the server {pid} does not end")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def accepts(running: embedded.Running) -> bool:
    return embedded.execute(running, "SELECT 1;").strip() == "1"


def test_a_server_stops_and_starts_again_with_the_same_port_password_and_data(home: Path) -> None:
    first = embedded.start(home)
    embedded.execute(first, "CREATE TABLE kept (id int); INSERT INTO kept VALUES (7);")

    stopped = embedded.stop(first)
    second = embedded.start(home)

    assert stopped
    assert first.started_by_us and second.started_by_us
    assert second.dsn == first.dsn
    assert second.pid != first.pid
    assert embedded.execute(second, "SELECT id FROM kept;").strip() == "7"
    assert embedded.stop(second)
    assert not embedded.stop(second)
    assert embedded.find(home) is None


def test_files_are_closed_to_others_and_settings_are_safe(home: Path) -> None:
    running = embedded.start(home)

    assert mode(running.directory) == mode(running.socket_directory) == 0o700
    assert mode(home / "postgres" / "password") == 0o600
    shown = "SELECT current_setting(name) FROM unnest(string_to_array('{}', ' ')) AS name;"
    names = "fsync synchronous_commit data_checksums max_prepared_transactions server_encoding lc_collate jit"
    if running.binaries.major >= 16:
        # PostgreSQL 16 made the locale a property of each database.
        names = names.removesuffix("lc_collate jit") + "jit"
        assert embedded.execute(running, "SELECT datcollate FROM pg_database WHERE datname = 'kassa';").strip() == "C"
    assert embedded.execute(running, shown.format(names)).split()[:5] == ["on", "on", "on", "64", "UTF8"]
    assert running.dsn not in repr(running)


async def test_tcp_needs_the_password(home: Path) -> None:
    running = embedded.start(home)

    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(running.dsn.replace("kassa:", "kassa:x"))


def test_root_runs_the_server_as_somebody_else_and_says_so(home: Path) -> None:
    running = embedded.start(home)

    owner = Path(f"/proc/{running.pid}").stat().st_uid
    assert owner == running.account.uid != 0
    assert any("does not run as root" in each and running.account.name in each for each in running.notices) == IS_ROOT


def test_a_running_server_is_adopted_and_stopped_by_whoever_adopted_it(home: Path) -> None:
    first = embedded.start(home)

    second = embedded.start(home)

    assert (second.pid, second.dsn, second.started_by_us, second.is_kassas) == (first.pid, first.dsn, False, True)
    assert embedded.stop(second)
    assert not embedded.stop(first)


def test_a_server_is_known_as_ours_even_if_we_were_killed_before_we_noted_it(home: Path) -> None:
    running = embedded.start(home)
    command = Path(f"/proc/{running.pid}/cmdline").read_bytes().decode()
    token = command.partition("cluster_name=kassa-")[2].split("\0")[0]
    (running.directory.parent / "owner.json").write_text(f'{{"token": "{token}"}}')

    assert embedded.start(home).is_kassas


def test_a_server_that_kassa_did_not_start_is_used_and_never_stopped(home: Path) -> None:
    running = embedded.start(home)
    embedded.stop(running)
    log = running.directory / "by-hand.log"
    by_hand = [running.binaries.program("pg_ctl"), "start", "-w", "-s", "-D", str(running.directory), "-l", str(log)]
    assert run_as(running.account, by_hand).returncode == 0

    adopted = embedded.start(home)

    assert not adopted.is_kassas
    assert any("not started by Kassa" in notice for notice in adopted.notices)
    assert not embedded.stop(adopted)
    assert accepts(adopted)


def test_two_starts_at_once_give_one_server(home: Path) -> None:
    found: list[embedded.Running] = []
    threads = [threading.Thread(target=lambda: found.append(embedded.start(home))) for _ in range(3)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({each.pid for each in found}) == 1
    assert sorted(each.started_by_us for each in found) == [False, False, True]


def test_after_kill_9_of_the_server_what_was_committed_is_there(home: Path) -> None:
    running = embedded.start(home)
    embedded.execute(running, "CREATE TABLE kept (id int); INSERT INTO kept SELECT generate_series(1, 1000);")
    kill(home, signal.SIGKILL)

    again = embedded.start(home)

    assert again.started_by_us
    assert embedded.execute(again, "SELECT count(*) FROM kept;").strip() == "1000"


def test_a_pid_that_now_belongs_to_another_program_is_no_obstacle(home: Path) -> None:
    running = embedded.start(home)
    kill(home, signal.SIGKILL)
    account = running.account
    other = subprocess.Popen(["/bin/sleep", "60"], user=account.uid if account.switch else None)
    lines = pid_file(home).read_text().split("\n")
    pid_file(home).write_text("\n".join([str(other.pid), *lines[1:]]))

    again = embedded.start(home)

    assert accepts(again)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_path_too_long_for_a_socket_gets_a_short_one(home: Path) -> None:
    deep = home / ("long" * 20) / ("path" * 10)

    running = embedded.start(deep)

    assert running.socket_directory.parent == Path("/tmp")
    assert mode(running.socket_directory) == 0o700
    assert accepts(running)
    embedded.stop(running)
    running.socket_directory.rmdir()


def test_a_directory_that_the_servers_user_cannot_reach_keeps_its_data_elsewhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "ELSEWHERE", home / "var-lib-kassa")
    closed = home / "closed"
    closed.mkdir(mode=0o700)

    first = embedded.start(closed / "shop")
    embedded.stop(first)
    second = embedded.start(closed / "shop")

    elsewhere = first.directory.parent
    assert elsewhere.is_relative_to(home / "var-lib-kassa") == IS_ROOT
    assert (closed / "shop" / "postgres" / "place").exists() == IS_ROOT
    assert any(f"kept in {elsewhere}" in notice for notice in second.notices) == IS_ROOT
    assert second.dsn == first.dsn
    embedded.stop(second)


def test_a_place_elsewhere_that_is_gone_is_refused(home: Path) -> None:
    (home / "postgres").mkdir()
    (home / "postgres" / "place").write_text(f"{home}/nowhere\n")

    with pytest.raises(DatabaseRefused, match="which is gone; bring it back"):
        embedded.start(home)


def test_programs_that_the_servers_user_cannot_reach_are_copied(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, _ = find_binaries(server_account(None), home / "unused")
    packages = programs.bin.parents[2]
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(programs.bin.parents[1], closed / programs.bin.parents[1].name)
    libraries = f"{programs.bin.parents[1].name}.libs"
    if (packages / libraries).exists():
        shutil.copytree(packages / libraries, closed / libraries)
    monkeypatch.setenv("KASSA_PG_BIN", str(closed / programs.bin.relative_to(packages)))

    running = embedded.start(home)

    assert any("programs were copied to" in notice for notice in running.notices) == IS_ROOT
    assert accepts(running)


def test_the_directory_of_another_major_version_is_refused_with_instructions(home: Path) -> None:
    running = embedded.start(home)
    embedded.stop(running)
    (running.directory / "PG_VERSION").write_text("14\n")

    with pytest.raises(DatabaseRefused, match=r"made by PostgreSQL 14.*KASSA_PG_BIN.*pg_dump.*pg_restore.*pg_upgrade"):
        embedded.start(home)


@pytest.mark.needs("debian-postgresql")
def test_debians_postgresql_works_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KASSA_PG_BIN", str(newest_of_debian()))

    running = embedded.start(home)

    assert embedded.execute(running, "SHOW max_prepared_transactions; SHOW data_checksums;").split() == ["64", "on"]
    assert embedded.stop(running)


def test_programs_that_are_not_there_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KASSA_PG_BIN", str(home))

    with pytest.raises(DatabaseRefused, match="holds no PostgreSQL server: initdb"):
        embedded.start(home)


def test_a_user_that_does_not_exist_is_refused_for_root_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KASSA_PG_USER", "no-such-user")

    if IS_ROOT:
        with pytest.raises(DatabaseRefused, match="no unprivileged user named no-such-user"):
            embedded.start(home)
    else:
        assert accepts(embedded.start(home))


def test_a_port_that_somebody_took_is_replaced_with_a_notice(home: Path) -> None:
    first = embedded.start(home)
    embedded.stop(first)

    with socket.socket() as thief:
        # Connections of the server that was stopped may still be in their last wait.
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", first.port))
        thief.listen()
        second = embedded.start(home)

    assert second.port != first.port
    assert any(f"Port {first.port} is taken" in notice for notice in second.notices)


def test_a_server_that_does_not_start_says_why_and_what_to_do(home: Path) -> None:
    with pytest.raises(DatabaseUnreachable) as caught:
        embedded.start(home, settings={"shared_buffers": "a lot"})

    assert 'invalid value for parameter "shared_buffers": "a lot"' in str(caught.value)
    assert "Correct the settings" in str(caught.value)
    assert accepts(embedded.start(home))


def test_a_first_start_that_was_killed_half_way_is_begun_again(home: Path) -> None:
    unfinished = home / "postgres" / "data.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")

    assert accepts(embedded.start(home))
    assert not unfinished.exists()


def test_a_lost_password_is_replaced(home: Path) -> None:
    first = embedded.start(home)
    (home / "postgres" / "password").unlink()

    second = embedded.start(home)

    assert second.pid == first.pid
    assert second.dsn != first.dsn


def test_finding_starts_nothing(home: Path) -> None:
    assert embedded.find(home) is None
    running = embedded.start(home)

    found = embedded.find(home)

    assert found is not None
    assert (found.pid, found.dsn, found.started_by_us) == (running.pid, running.dsn, False)
