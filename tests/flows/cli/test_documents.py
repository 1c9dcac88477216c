"""What the README and the guide tell people to run is run, block by block, as they have it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli.house import Up, environment, set_up

ROOT = Path(__file__).parents[3]
TOLD = re.compile(r"^export (API=.*)$", re.MULTILINE)
"""Where a reader says what `kassa up` printed."""
BLOCK = re.compile(r"<!-- tested -->\n```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/guides/first-payment.md")


@pytest.fixture
def up() -> Iterator[Up]:
    with set_up() as directory:
        run = Up(directory)
        yield run
        run.stop()


@pytest.mark.needs("curl")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_the_document_tells_to_run_works(name: str, up: Up) -> None:
    """Where `kassa up` runs, as the reader's second terminal."""
    house = Path(up.said["dir"])
    place = house.parent
    (place / ".kassa").symlink_to(house)
    (place / ".venv").symlink_to(sys.prefix)
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    script = place / "script.sh"
    script.write_text(as_script(blocks, place), encoding="utf-8")
    printed = {
        "API": up.said["api"], "KEY": up.said["api_key"], "SANDBOX": up.sandbox, "MERCHANT": up.said["merchant"]
    }  # fmt: skip
    (told,) = TOLD.findall(text)
    given = environment() | {"PATH": without_kassa(os.environ["PATH"])}
    given |= {variable: printed[variable] for variable in re.findall(r"(\w+)=", told)}

    done = subprocess.run(
        ["bash", str(script)], cwd=place, env=given, capture_output=True, text=True, timeout=120, check=False
    )

    assert len(blocks) >= 4
    assert done.returncode == 0, done.stdout + done.stderr
    with up.client() as client:
        assert {payment.state for payment in client.payments.list()} == {"succeeded"}
        assert [refund.amount for refund in client.refunds.list()] in ([30], [300])


def without_kassa(path: str) -> str:
    """As a reader's PATH is before he has read: with no `kassa` on it."""
    return os.pathsep.join(place for place in path.split(os.pathsep) if not (Path(place) / "kassa").exists())


def as_script(blocks: list[tuple[str, str]], place: Path) -> str:
    """All blocks as one shell session that stops at the first failure, a refused request included."""
    lines = ["set -euo pipefail", 'curl() { command curl --fail-with-body --noproxy "*" "$@"; }']
    for number, (language, text) in enumerate(blocks):
        if language == "python":
            file = place / f"block{number}.py"
            file.write_text(text, encoding="utf-8")
            lines.append(f"python {file}")
        else:
            lines.append(text)
    return "\n".join(lines)
