"""docs/reference/broker-urls.md names every option that a broker's URL may have, and nothing else."""

import inspect
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlencode

import pytest

from kassa.errors import SettingInvalid
from kassa.messaging.binders import amqp, kafka, rocketmq_wire, zeromq
from kassa.messaging.binders.rocketmq import RocketTransport
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.topology import TOPOLOGY
from kassa.settings import Settings
from servers.certificates import certificates

PAGE = (Path(__file__).parents[3] / "docs/reference/broker-urls.md").read_text(encoding="utf-8")
OPTION = re.compile(r"^\| `(\w+)=([^`]+)` \| (.+?) \| ", re.MULTILINE)
EXAMPLE = re.compile(r"(?:--broker |KASSA_BROKERS=)'?([^'\s]+)")


class Reader(NamedTuple):
    """What reads a broker's URL."""

    name: str
    section: str
    module: ModuleType
    url: str
    always: Mapping[str, str] = {}
    """What other options need beside them."""

    def with_options(self, **options: str) -> str:
        return f"{self.url}?{urlencode(options)}"


FILES = {"ca": "ca.pem", "cert": "kassa.pem", "key": "kassa.key"}
OWN = {name: FILES[name] for name in ("cert", "key")}
READERS = (
    Reader("rabbitmq", "RabbitMQ", amqp, "amqps://user:word@host/", OWN),
    Reader("kafka", "Apache Kafka", kafka, "kafka+ssl://user:word@host:9093"),
    Reader("rocketmq", "Apache RocketMQ 5", rocketmq_wire, "rocketmq://key:word@host:8081", {"tls": "1"}),
    Reader("zeromq", "ZeroMQ", zeromq, "zeromq://127.0.0.1:7000"),
)
VALUES = {"HOST:PORT": "host:9876", "SECONDS": "5", "N": "2", "NAME": "x", "TEXT": "x", "DIR": "keys"}


def section_of(name: str) -> str:
    """A part of the page."""
    return PAGE.partition(f"## {name}\n")[2].partition("\n## ")[0]


def accepted(module: ModuleType) -> set[str]:
    """The options that a parser asks for by name, as its source has them."""
    source = inspect.getsource(module.read_url)
    for helper in ("_tls", "_seconds"):
        source += inspect.getsource(getattr(module, helper)) if hasattr(module, helper) else ""
    found = set(re.findall(r'(?:(?:given|query)\.(?:pop|get)|choice|number)\(\s*"(\w+)"', source))
    found |= {*getattr(module, "_TLS_FILES", ())}
    if known := re.search(r"set\(given\) - \{([^}]*)\}", source):
        found |= set(re.findall(r'"(\w+)"', known[1]))
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the files that the page speaks of."""
    made = certificates(tmp_path)
    shutil.copy(made.server, tmp_path / "kassa.pem")
    shutil.copy(made.key, tmp_path / "kassa.key")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.section)
def test_the_page_has_exactly_the_options_that_the_code_accepts(reader: Reader) -> None:
    options = accepted(reader.module)

    assert len(options) >= 6
    assert {name for name, _, _ in OPTION.findall(section_of(reader.section))} == options


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.section)
def test_every_option_of_the_page_is_taken_with_every_value(reader: Reader) -> None:
    for name, values, _ in OPTION.findall(section_of(reader.section)):
        for value in values.split(r"\|"):
            given = FILES.get(name, "file") if value == "FILE" else VALUES.get(value, value)
            reader.module.read_url(reader.with_options(**{**reader.always, name: given}))
    with pytest.raises(SettingInvalid):
        reader.module.read_url(reader.with_options(**reader.always, colour="red"))


@pytest.mark.usefixtures("place")
def test_every_example_of_the_page_can_be_read() -> None:
    examples = EXAMPLE.findall(PAGE)

    assert len(examples) >= 8
    for url in examples:
        (named,) = read_brokers([url])
        for reader in READERS:
            if named.name == reader.name:
                reader.module.read_url(named.url)


@pytest.mark.parametrize(
    ("name", "section", "default"),
    [
        ("heartbeat", "RabbitMQ", amqp.HEARTBEAT_S),
        ("new_queue_pause", "RabbitMQ", amqp.NEW_QUEUE_PAUSE_S),
        ("local_queue", "Apache Kafka", kafka.LOCAL_QUEUE),
        ("lease_s", "ZeroMQ", zeromq.LEASE_S),
    ],
)
def test_numbers_of_the_page_are_those_of_the_code(name: str, section: str, default: float) -> None:
    found = {option: said for option, _, said in OPTION.findall(section_of(section))}

    assert float(found[name]) == default


async def test_rocketmq_without_its_name_server_is_told_a_way_that_works() -> None:
    transport = RocketTransport(rocketmq_wire.read_url("rocketmq://key:word@proxy:8081"))

    with pytest.raises(SettingInvalid, match=r"needs namesrv=HOST:PORT") as told:
        await transport.provision(TOPOLOGY, verify_only=True)

    assert "word" not in str(told.value)
    (example,) = re.findall(r"rocketmq://PROXY\S+\d", str(told.value))
    assert rocketmq_wire.read_url(example).name_server == ("NAMESERVER", 9876)
    assert "broker_topology" not in str(told.value)
    assert Settings().broker_topology == "create"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("amqp://user:word@host?ca=ca.pem", "ca is for TLS: begin with amqps://"),
        ("amqps://user:word@host?ca=/no/such.pem", r"certificates cannot be read \(ca=/no/such.pem\).*No such file"),
    ],
)
def test_option_of_rabbitmq_that_cannot_be_used_is_refused_with_the_mend(url: str, says: str) -> None:
    with pytest.raises(SettingInvalid, match=says) as refused:
        amqp.read_url(url)

    assert "word" not in str(refused.value)
