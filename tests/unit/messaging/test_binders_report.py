"""The table of what each binder can do says what the run found, and what did not run was not tested."""

import re
from datetime import date
from pathlib import Path

from conformance.messaging import report
from kassa.messaging.registry import REGISTRY

SUITE = "tests/conformance/messaging/test_binders.py::"


def run() -> report.Run:
    return report.read_run(
        [
            (f"{SUITE}test_record_arrives[memory]", "passed"),
            (f"{SUITE}test_record_arrives[postgres]", "skipped"),
            (f"{SUITE}test_order_holds[memory]", "passed"),
            (f"{SUITE}test_order_holds[memory]", "error"),
            ("tests/unit/test_clock.py::test_order_holds[memory]", "failed"),
        ]
    )


def test_the_worst_outcome_of_a_test_counts_and_what_did_not_run_was_not_tested() -> None:
    found = run()

    assert found.results["record arrives"] == {"memory": report.PASSED, "postgres": report.NOT_TESTED}
    assert found.results["order holds"] == {"memory": report.FAILED}
    assert found.counts("zeromq") == {report.PASSED: 0, report.FAILED: 0, report.NOT_TESTED: 2}


def test_the_table_at_the_end_names_what_failed() -> None:
    lines = report.summary(run())

    assert "failed: memory: order holds" in lines
    assert len(lines) == 1 + len(set(REGISTRY.values())) + 1


def test_the_page_is_dated_and_has_versions_and_traits_of_every_binder() -> None:
    page = report.page(run(), date(2026, 1, 2), {"postgres": "PostgreSQL 18.1"})

    assert "2026-01-02" in page and "PostgreSQL 18.1" in page and "asyncpg" in page
    assert "| record arrives |" in page and "**✗**" in page
    assert all(f"| {says} |" in page for says in report.TRAITS.values())


def test_the_page_in_the_docs_has_every_claim_of_the_suite_proven_on_every_binder() -> None:
    """As `make queues-table` makes it, which to run again is what to do when this fails."""
    root = Path(__file__).parents[3]
    suite = (root / "tests/conformance/messaging/test_binders.py").read_text()
    claims = [name.replace("_", " ") for name in re.findall(r"^async def test_(\w+)", suite, re.MULTILINE)]
    page = (root / "docs/reference/binders.md").read_text()

    proven = "| " + " | ".join("✓" for _ in run().binders) + " |"
    assert claims
    assert [claim for claim in claims if f"| {claim} {proven}" not in page] == []


def test_every_trait_is_in_the_table() -> None:
    from kassa.messaging.model import Traits

    assert set(report.TRAITS) == set(Traits._fields)
