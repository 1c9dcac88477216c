"""Writes the twin without `await` from the client: `python -m kassa.client.generate`. Needs the package unasync."""

import shutil
import tempfile
from pathlib import Path

import unasync  # type: ignore[import-untyped]

HERE = Path(__file__).parent
SOURCE = HERE / "asynchronous.py"
TARGET = HERE / "synchronous.py"

WORDS = {
    "AsyncKassa": "Kassa",
    "AsyncPayments": "Payments",
    "AsyncRefunds": "Refunds",
    "AsyncTopups": "Topups",
    "AsyncWallets": "Wallets",
    "AsyncEvents": "Events",
    "AsyncWebhookEndpoints": "WebhookEndpoints",
    "AsyncBalances": "Balances",
    "AsyncClient": "Client",
    "AsyncIterator": "Iterator",
    "aclose": "close",
    "asyncio": "time",
}


def generated() -> str:
    """The text that synchronous.py must have."""
    with tempfile.TemporaryDirectory() as place:
        inside, outside = Path(place) / "from", Path(place) / "to"
        inside.mkdir()
        shutil.copy(SOURCE, inside / SOURCE.name)
        rule = unasync.Rule(f"{inside}/", f"{outside}/", additional_replacements=WORDS)
        unasync.unasync_files([str(inside / SOURCE.name)], [rule])
        text = (outside / SOURCE.name).read_text(encoding="utf-8")
    return _sentences(text)


def _sentences(text: str) -> str:
    """What stands in docstrings, which the tokens do not reach; and what of the style the other twin decides."""
    text = text.replace("import time\nimport random\n", "import random\nimport time\n")
    text = text.replace(
        "            for one in page.data:\n                yield one\n", "            yield from page.data\n"
    )
    text = text.replace(
        '"""The client of Kassa\'s API. The twin without `await` is generated from asynchronous.py; change that one.',
        '"""The client of Kassa\'s API without `await`. Generated from asynchronous.py by kassa.client.generate.',
    )
    return (
        text.replace('async with AsyncKassa("', 'with Kassa("')
        .replace("payment = await kassa", "payment = kassa")
        .replace("or use it with `async with`", "or use it with `with`")
    )


if __name__ == "__main__":
    TARGET.write_text(generated(), encoding="utf-8")
