"""How jars come: all or none, once, and with words that help when they do not. A copy of the package with its own Maven."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kassa.db import embedded
from servers import ServerUnavailable, installation

CHECKOUT = Path(__file__).parents[2]

MAVEN = """#!/bin/sh
echo called >>"$0.calls"
for argument in "$@"; do
    case $argument in -DoutputDirectory=*) touch "${argument#*=}/kafka.jar" ;; esac
done
[ ! -e "$0.fails" ] || { echo "no route to host"; exit 1; }
"""

pytestmark = pytest.mark.needs("java")


@pytest.fixture
def place() -> Iterator[Path]:
    """A checkout with nothing but the servers, whose Maven fetches an empty file."""
    with embedded.temporary_directory("kassa-install-") as place:
        shutil.copytree(CHECKOUT / "servers", place / "servers", ignore=shutil.ignore_patterns("__pycache__"))
        maven = place / "bin" / "mvn"
        maven.parent.mkdir()
        maven.write_text(MAVEN)
        maven.chmod(0o755)
        yield place


def test_jars_are_fetched_once(place: Path) -> None:
    first, second = _install(place), _install(place)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (place / "bin" / "mvn.calls").read_text() == "called\n"
    assert [jar.name for jar in place.glob(".cache/servers/jars/kafka-*/*")] == ["kafka.jar"]


def test_other_versions_are_fetched_anew(place: Path) -> None:
    _install(place)
    pinned = place / "servers" / "versions.toml"
    pinned.write_text(pinned.read_text().replace("log4j-slf4j-impl:2.", "log4j-slf4j-impl:3."))

    _install(place)

    assert (place / "bin" / "mvn.calls").read_text() == "called\n" * 2


def test_what_could_not_be_fetched_is_named_with_the_fix_and_leaves_no_half(place: Path) -> None:
    fails = place / "bin" / "mvn.fails"
    fails.touch()

    failed = _install(place)

    assert failed.returncode == 1
    assert "kafka cannot be had" in failed.stderr
    assert "no route to host" in failed.stderr
    assert "Connect this machine" in failed.stderr

    fails.unlink()
    assert _install(place).returncode == 0


def test_a_server_that_is_not_known_is_refused(place: Path) -> None:
    refused = _run(place, "install", "activemq")

    assert refused.returncode == 2
    assert "there is no server activemq" in refused.stderr


def _install(place: Path) -> subprocess.CompletedProcess[str]:
    return _run(place, "install", "kafka")


def _run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "servers", *arguments],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"},
        check=False,
    )


@pytest.mark.needs("rabbitmq")
def test_rabbitmq_that_is_too_old_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_version", lambda sbin: [3, 9, 99])

    with pytest.raises(ServerUnavailable, match=r"is older than 3\.10"):
        installation.rabbitmq()
