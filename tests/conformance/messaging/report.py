"""What each binder can do, as a real run of the suite found it: a small table for its end, and a page for the docs."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pytest

from kassa.messaging.model import Traits
from kassa.messaging.registry import REGISTRY
from servers import is_installed
from servers.installation import rabbitmq, versions

PASSED, FAILED, NOT_TESTED = "passed", "failed", "not tested"
Result = str

POSTGRES = "postgresql"
"""The property of a test that says PostgreSQL's version."""

CLIENTS: Mapping[str, tuple[str, ...]] = {
    "kafka": ("confluent-kafka",),
    "postgres": ("asyncpg",),
    "rabbitmq": ("aiormq",),
    "rocketmq": ("grpcio",),
    "zeromq": ("pyzmq",),
}
"""The packages that speak with each broker."""
_ID = re.compile(r"conformance/messaging/test_binders\.py::test_(\w+)\[([\w+-]+)\]$")
TRAITS: Mapping[str, str] = {
    "durable": "confirmed records survive its death",
    "ordered": "records of a key come in order, to one consumer at a time",
    "delay_max_s": "longest delay",
    "priorities": "classes of priority",
    "dead_letters": "keeps dead letters, with reason and history",
    "counts_attempts": "counts failed attempts",
    "acknowledges_in_change": "the effect's commit is the acknowledgement",
    "deduplicates": "a record that is sent again while it waits is there once",
    "batch_max": "records in one send",
    "bytes_max": "body of one message",
    "reports_depth": "says how much waits",
    "request_reply": "takes answers to an address",
}


class Run(NamedTuple):
    """Results by claim (in the order of the suite) and binder."""

    results: dict[str, dict[str, Result]]

    @property
    def binders(self) -> list[str]:
        """Those of the registry, whether they were tested or not."""
        return sorted({module.rpartition(".")[2] for module in REGISTRY.values()})

    def counts(self, binder: str) -> dict[Result, int]:
        """How many claims ended how; what did not run was not tested."""
        found = [row.get(binder, NOT_TESTED) for row in self.results.values()]
        return {result: found.count(result) for result in (PASSED, FAILED, NOT_TESTED)}


def tell(reporter: pytest.TerminalReporter, file: Path | None) -> None:
    """What each binder can do, as this run found it, and as a page too where one is asked for; nothing, where the suite did
    not run. For tests/conftest.py: with several workers the one that tells collects nothing, and never loads the suite's own.
    """
    run = read_run(
        [
            (one.nodeid, outcome)
            for outcome in ("passed", "failed", "error", "skipped")
            for one in reporter.stats.get(outcome, [])
            if outcome != "passed" or one.when == "call"
        ]
    )
    if not run.results:
        return
    reporter.section("binders")
    for line in summary(run):
        reporter.write_line(line)
    if file is None:
        return
    if left_out := [binder for binder in run.binders if run.counts(binder)[NOT_TESTED]]:
        reporter.write_line(f"not written: {file}, since not everything was tested on {', '.join(left_out)}")
    else:
        said = [dict(one.user_properties).get(POSTGRES) for one in reporter.stats.get("passed", [])]
        write(run, file, datetime.now(UTC).date(), server_versions(next(filter(None, said), "")))
        reporter.write_line(f"written: {file}")


def read_run(outcomes: Sequence[tuple[str, str]]) -> Run:
    """outcomes: pytest's name of each test, and passed, failed, error or skipped; a test may have several, and the worst one
    counts. What is not of the binders' suite is left out."""
    results: dict[str, dict[str, Result]] = {}
    for name, outcome in outcomes:
        found = _ID.search(name)
        module = REGISTRY.get(found[2]) if found else None
        if found is None or module is None:
            continue
        row = results.setdefault(found[1].replace("_", " "), {})
        binder = module.rpartition(".")[2]
        result = {"passed": PASSED, "skipped": NOT_TESTED}.get(outcome, FAILED)
        row[binder] = FAILED if FAILED in (result, row.get(binder)) else result
    return Run(results)


def summary(run: Run) -> list[str]:
    """The table at the end of a run, and what failed by name."""
    width = max(map(len, run.binders))
    lines = [f"{'binder':<{width}}  {PASSED:>6}  {FAILED:>6}  {NOT_TESTED:>10}"]
    for binder in run.binders:
        count = run.counts(binder)
        lines.append(f"{binder:<{width}}  {count[PASSED]:>6}  {count[FAILED]:>6}  {count[NOT_TESTED]:>10}")
    for claim, row in run.results.items():
        lines += [f"failed: {binder}: {claim}" for binder, result in row.items() if result == FAILED]
    return lines


def page(run: Run, today: date, servers: Mapping[str, str]) -> str:
    """The page of the docs. servers: the version of each binder's server."""
    binders = run.binders
    marks = {PASSED: "✓", FAILED: "**✗**", NOT_TESTED: "–"}
    lines = [
        "# What each binder can do",
        "",
        f"Made by `make queues-table` from a run of `tests/conformance/messaging` on real servers, {today.isoformat()}. "
        "Do not edit it.",
        "",
        "✓ passed · **✗** failed · – not tested in this run",
        "",
        *_table(["", *binders], [["server", *(servers.get(one, "") for one in binders)],
                                ["client", *(_client(one) for one in binders)]]),
        "",
        "## Proven, the same on each",
        "",
        *_table(["", *binders],
                [[claim, *(marks[row.get(one, NOT_TESTED)] for one in binders)] for claim, row in run.results.items()]
                + [["**passed**", *(f"{run.counts(one)[PASSED]} of {len(run.results)}" for one in binders)]]),
        "",
        "## What each does by itself",
        "",
        "What it lacks Kassa supplies from PostgreSQL (`docs/decisions/0005-supplied.md`), so that the behaviour above is the "
        "same.",
        "",
        *_table(["", *binders],
                [[says, *(_shown(trait, getattr(_traits(one), trait)) for one in binders)] for trait, says in TRAITS.items()]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(run: Run, file: Path, today: date, servers: Mapping[str, str]) -> None:
    """The page, into a file."""
    file.write_text(page(run, today, servers), encoding="utf-8")


def server_versions(postgres: str) -> dict[str, str]:
    """What the suite ran against. postgres: PostgreSQL's own word for itself."""
    pinned = versions()
    found = re.search(r"rabbitmq_server-([\d.]+)", str(rabbitmq())) if is_installed("rabbitmq") else None
    return {
        "kafka": f"Apache Kafka {pinned['kafka']['version']}",
        "memory": "none, for tests",
        "postgres": f"PostgreSQL {postgres}",
        "rabbitmq": f"RabbitMQ {found[1]}" if found else "",
        "rocketmq": f"Apache RocketMQ {pinned['rocketmq']['version']}",
        "zeromq": "Kassa's own hub",
    }


def _client(binder: str) -> str:
    said = []
    for package in CLIENTS.get(binder, ()):
        try:
            said.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            said.append(f"{package} (not installed)")
    return ", ".join(said)


def _traits(binder: str) -> Traits:
    module = next(module for module in REGISTRY.values() if module.endswith(f".{binder}"))
    traits: Traits = import_module(module).TRAITS
    return traits


def _shown(trait: str, value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if trait == "delay_max_s":
        return "none" if not value else f"{value / 86_400:,.0f} days" if value >= 86_400 else f"{value:,.0f} s"
    if trait == "bytes_max":
        return f"{value / 2**20:.3g} MiB"
    return "none" if trait == "priorities" and value == 1 else f"{value:,}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
