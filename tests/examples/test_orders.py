"""The example of the guide, as its reader runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("broker", [[], ["postgres"]], ids=["zeromq", "postgres"])
def test_order_service_packs_each_paid_order_once_though_it_is_killed(broker: list[str]) -> None:
    command = [sys.executable, str(ROOT / "examples" / "orders" / "run.py"), *broker]
    told = subprocess.run(command, capture_output=True, text=True, check=False)

    assert told.returncode == 0, told.stderr
    assert "Order 1002: paid while the order service was dead; it is waiting." in told.stdout
    assert told.stdout.endswith("Each order was packed once.\n")
