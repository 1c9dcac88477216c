"""Where the servers come from: Debian's packages, and jars that Maven fetches once. Repeated, it looks and does nothing."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from kassa.db.account import Account, can_enter, server_account
from kassa.errors import DatabaseRefused
from servers.errors import ServerUnavailable

CHECKOUT = Path(__file__).resolve().parent.parent
_ELSEWHERE = Path("/var/cache/kassa")
"""For root, when the unprivileged user cannot reach the checkout."""
_APT_TIMEOUT_S = 900
_MAVEN_TIMEOUT_S = 900


def install(name: str) -> None:
    """Make sure that the server `name` can be started.

    Raises ServerUnavailable, with what a person can do, when this machine cannot have it.
    """
    _INSTALL[name]()


def is_installed(name: str) -> bool:
    """Whether `install` would have nothing to do; quick, and changes nothing. `java` is a name too."""
    return _IS_INSTALLED[name]()


@cache
def versions() -> Mapping[str, Any]:
    """What versions.toml says."""
    return tomllib.loads(Path(__file__).with_name("versions.toml").read_text())


@cache
def account() -> Account:
    """Whom the servers run as: ourselves, and for root the user that PostgreSQL has too."""
    try:
        return server_account(None)
    except DatabaseRefused as refused:
        raise ServerUnavailable("A server", refused.detail, fix="Set KASSA_PG_USER.") from refused


@cache
def home() -> Path:
    """Where jars, and the data of `make servers`, are kept: in the checkout if the servers' user can reach that."""
    if can_enter(account(), CHECKOUT):
        return CHECKOUT / ".cache" / "servers"
    return _ELSEWHERE / sha256(os.fsencode(CHECKOUT)).hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One at a time; the kernel lets go of the lock when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rabbitmq() -> Path:
    """The directory with RabbitMQ's own programs, of the newest version that is here.

    Raises ServerUnavailable when there is none.
    """
    found = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"), key=_version)
    if not found:
        raise ServerUnavailable("rabbitmq", "its package is not installed.", fix=_by_hand("rabbitmq"))
    if _version(found[-1]) < (minimum := versions()["rabbitmq"]["version_min"]):
        needed = ".".join(map(str, minimum))
        raise ServerUnavailable(
            "rabbitmq", f"{found[-1].parent.name} is older than {needed}.", fix=_by_hand("rabbitmq")
        )
    return found[-1]


def java() -> Path:
    """A Java that is new enough: of JAVA_HOME, of the PATH, or of Debian's place for them.

    Raises ServerUnavailable when there is none.
    """
    named = os.environ.get("JAVA_HOME")
    places = [
        *([Path(named) / "bin" / "java"] if named else []),
        *([Path(found)] if (found := shutil.which("java")) else []),
        *sorted(Path("/usr/lib/jvm").glob("*/bin/java")),
    ]
    for program in places:
        if program.exists() and _java_major(program) >= versions()["java"]["major_min"]:
            return program
    needed = versions()["java"]["major_min"]
    raise ServerUnavailable("java", f"there is no Java {needed} or newer.", fix=_by_hand("java"))


def jars(name: str) -> Path:
    """The directory with the jars of `name`, fetched before.

    Raises ServerUnavailable when they were not.
    """
    place = _jars_place(name)
    if not place.is_dir():
        raise ServerUnavailable(name, "its jars were not fetched.", fix=f"Run `python -m servers install {name}`.")
    return place


def _install_rabbitmq() -> None:
    if not is_installed("rabbitmq"):
        _apt("rabbitmq", versions()["debian"]["rabbitmq"])
    rabbitmq()


def _install_java() -> None:
    for package in versions()["debian"]["java"]:
        if is_installed("java"):
            return
        _apt("java", [package])
    java()


def _install_jars(name: str) -> None:
    _install_java()
    place = _jars_place(name)
    with locked(place.parent / f"{name}.lock"):
        if not place.is_dir():
            _fetch(name, place)


def _fetch(name: str, place: Path) -> None:
    """All jars at once into their place: a directory there is always whole."""
    if shutil.which("mvn") is None:
        _apt("maven", versions()["debian"]["maven"])
    unfinished = place.with_name(f"{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    project = unfinished / "pom.xml"
    project.write_text(_project(name))
    print(f"Fetching {name} {versions()[name]['version']}", file=sys.stderr, flush=True)
    command = ["mvn", "-q", "-B", "-ntp", "-f", str(project), "dependency:copy-dependencies", "-DincludeScope=runtime"]
    fetched = subprocess.run(
        [*command, f"-DoutputDirectory={unfinished}"],
        capture_output=True,
        text=True,
        timeout=_MAVEN_TIMEOUT_S,
        check=False,
    )
    if fetched.returncode != 0:
        raise ServerUnavailable(
            name,
            f"Maven could not fetch its jars: {_first_error(fetched.stdout + fetched.stderr)}",
            fix="Connect this machine, or give Maven a mirror in ~/.m2/settings.xml. "
            "Behind a proxy with a certificate of its own, Java has to know that one.",
        )
    project.unlink()
    for file in (unfinished, *unfinished.iterdir()):
        file.chmod(0o755 if file.is_dir() else 0o644)
    unfinished.rename(place)


def _project(name: str) -> str:
    dependencies = "".join(
        "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>".format(
            *artifact.split(":")
        )
        for artifact in versions()[name]["artifacts"]
    )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        f"<groupId>local</groupId><artifactId>{name}</artifactId><version>1</version><packaging>pom</packaging>"
        f"<dependencies>{dependencies}</dependencies></project>\n"
    )


def _jars_place(name: str) -> Path:
    """Named after what should be in it, so that a changed version is fetched anew."""
    wanted = sha256("\n".join(versions()[name]["artifacts"]).encode()).hexdigest()[:12]
    return home() / "jars" / f"{name}-{versions()[name]['version']}-{wanted}"


def _has(look: Callable[[], Path]) -> bool:
    try:
        look()
    except ServerUnavailable:
        return False
    return True


def _apt(name: str, packages: list[str]) -> None:
    done = subprocess.run(
        [CHECKOUT / "scripts" / "apt.sh", *packages],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_APT_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise ServerUnavailable(name, _end(done.stdout), fix=_by_hand(name))


def _by_hand(name: str) -> str:
    package = versions()["debian"][name][0]
    return f"As root, with a network: apt-get install {package}."


def _first_error(text: str) -> str:
    """What Maven says went wrong: advice is all that it ends with."""
    errors = (line.partition("[ERROR] ")[2].strip() for line in text.splitlines())
    return next(filter(None, errors), _end(text))


def _end(text: str) -> str:
    return " ".join(text.strip().splitlines()[-4:])


@cache
def _java_major(program: Path) -> int:
    said = subprocess.run([program, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', said)
    return int(found[1]) if found else 0


def _version(sbin: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", sbin.parent.name)]


_INSTALL: Mapping[str, Callable[[], None]] = {
    "rabbitmq": _install_rabbitmq,
    "java": _install_java,
    "kafka": lambda: _install_jars("kafka"),
    "rocketmq": lambda: _install_jars("rocketmq"),
}

_IS_INSTALLED: Mapping[str, Callable[[], bool]] = {
    "rabbitmq": lambda: _has(rabbitmq),
    "java": lambda: _has(java),
    "kafka": lambda: _has(java) and _has(lambda: jars("kafka")),
    "rocketmq": lambda: _has(java) and _has(lambda: jars("rocketmq")),
}
