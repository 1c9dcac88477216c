"""What deploy/ gives to Prometheus and Grafana: valid, tested, and about numbers that Kassa really has."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kassa.observability.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES = PROMETHEUS / "kassa.rules.yml"
RULE_TESTS = PROMETHEUS / "kassa.rules.test.yml"
DASHBOARD = DEPLOY / "grafana" / "kassa.json"


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counted() -> Metrics:
    """Numbers, each with a sample, so that the page has their labels."""
    metrics = Metrics()
    metrics.http_answered("/v1/payments", "POST", 201, 0.1)
    metrics.channel_called("wechat", "create", "pending")
    metrics.webhook_tried("taken")
    metrics.journal_committed(1, 0.1)
    metrics.queue_seen("payment_order", "kassa", length=0, oldest_age_s=0, dead=0, is_read=True)
    metrics.broker_seen("rabbitmq", 0.0)
    metrics.doubts_seen("attempt", count=0, oldest_s=0)
    metrics.delivery_handled("payment_order", "kassa", 0.1)
    metrics.meters.sending("kassa.events").confirmed += 1
    metrics.meters.watch_breaker("mails", _Whole())
    return metrics


class _Whole:
    """A circuit breaker that is closed."""

    def open_count(self) -> int:
        return 0


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of each series that a program exports, by its name."""
    found: dict[str, set[str]] = {}
    for line in counted().render().decode().splitlines():
        if line.startswith("kassa_"):
            name, _, rest = line.partition("{")
            name = name.split()[0]
            labels = re.findall(r'(\w+)="', rest) if "{" in line else []
            found.setdefault(name, set()).update(labels)
    return found


def expressions_of_rules() -> list[str]:
    return re.findall(r"^\s+expr: (.+)$", RULES.read_text(), re.MULTILINE)


def expressions_of_dashboard() -> list[str]:
    panels: list[Any] = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each series that an expression reads, and the labels that it asks for."""
    for name, matchers in re.findall(r"\b(kassa_\w+)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def test_every_number_in_rules_and_dashboard_is_one_that_kassa_has(exported: dict[str, set[str]]) -> None:
    expressions = expressions_of_rules() + expressions_of_dashboard()

    assert len(expressions) > 50
    for expression in expressions:
        for name, labels in selectors(expression):
            assert name in exported, f"{name} in: {expression}"
            assert labels <= exported[name] | {"instance", "job"}, f"{name}{{{labels}}} in: {expression}"


def test_every_label_that_is_grouped_by_is_one_that_the_series_has(exported: dict[str, set[str]]) -> None:
    for expression in expressions_of_rules() + expressions_of_dashboard():
        grouped = {label for some in re.findall(r"\bby \(([^)]*)\)", expression) for label in some.split(", ")}
        there = {label for name, _ in selectors(expression) for label in exported[name]}
        assert grouped <= there | {"instance", "job"}, expression


def test_every_number_that_kassa_has_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    shown = {name for expression in expressions_of_dashboard() for name, _ in selectors(expression)}
    families = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in shown}

    missing = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in exported} - families

    assert missing == set()


def test_every_alert_says_what_is_so_and_what_to_do_and_is_tested() -> None:
    alerts = re.split(r"^\s+- alert: ", RULES.read_text(), flags=re.MULTILINE)[1:]
    tested = RULE_TESTS.read_text()

    assert len(alerts) >= 20
    for alert in alerts:
        name = alert.split()[0]
        assert re.search(r"severity: (page|ticket)", alert), name
        assert re.search(r'summary: ".{20,}"', alert) and re.search(r'action: ".{20,}"', alert), name
        assert f'alertname="{name}"' in tested, name


@pytest.mark.needs("promtool")
def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    assert "SUCCESS" in promtool("check", "rules", RULES)
    assert "SUCCESS" in promtool("check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.needs("promtool")
def test_each_alert_fires_for_what_it_is_for_and_a_house_that_is_well_is_silent() -> None:
    assert "SUCCESS" in promtool("test", "rules", RULE_TESTS)


@pytest.mark.needs("promtool")
def test_prometheus_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$topic", ".*")}
        for number, expression in enumerate(expressions_of_dashboard())
    ]
    # JSON is YAML.
    (tmp_path / "dashboard.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    assert f"{len(rules)} rules found" in promtool("check", "rules", tmp_path / "dashboard.yml")


@pytest.mark.needs("promtool")
def test_prometheus_can_read_the_page_itself(tmp_path: Path) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=counted().render(), capture_output=True, check=False)

    # Exit code 3: it would name some of them otherwise; 1: it cannot read the page.
    assert done.returncode in (0, 3), done.stderr.decode()
