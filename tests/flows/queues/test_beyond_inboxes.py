"""Events are sent again only as far back as services remember what they handled, unless somebody says that it may be further.

What is refused is the same whatever the broker: one of them is enough.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from flows.api.support import House, running
from flows.queues.test_operating import operator_of
from kassa.cli.queue import replay
from kassa.errors import RequestInvalid
from kassa.messaging.outbox import INBOX_KEEP
from kassa.messaging.queues import AGAIN_MAX

RELAY = "relay:zeromq:kassa.events"
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[House]:
    """A house whose relay sends events to a broker."""
    async with running(database_url, brokers=("zeromq",), order_queue="plain") as house:
        yield house


async def test_events_older_than_inboxes_are_sent_again_only_on_demand(house: House) -> None:
    await (await house.shop()).wallet(1_000)
    now = datetime.now(UTC)

    assert AGAIN_MAX < INBOX_KEEP
    with pytest.raises(RequestInvalid, match=f"{AGAIN_MAX.days} days.*--beyond-inboxes"):
        await house.app.queues.send_again(RELAY, now - AGAIN_MAX - MINUTE)
    assert await house.app.queues.send_again(RELAY, now - AGAIN_MAX + MINUTE) > 0
    assert await house.app.queues.send_again(RELAY, now - 10 * AGAIN_MAX, beyond_inboxes=True) > 0


async def test_the_limit_holds_over_http_too(house: House) -> None:
    await (await house.shop()).wallet(1_000)
    operator = await operator_of(house)
    path, since = f"/v1/queues/{RELAY}/replay", (datetime.now(UTC) - AGAIN_MAX - MINUTE).isoformat()

    refused = await operator.post(path, {"since": since}, expect=400)
    alone = await operator.post(path, {"all": True, "beyond_inboxes": True}, expect=400)
    sent = await operator.post(path, {"since": since, "beyond_inboxes": True})

    assert refused["errors"][0]["field"] == "since" and "beyond_inboxes" in refused["errors"][0]["message"]
    assert alone["errors"][0]["field"] == "beyond_inboxes"
    assert sent["replayed"] > 0
    await operator.close()


async def test_the_command_names_the_limit_and_the_flag(
    house: House, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KASSA_SECRETS_KEY", base64.b64encode(bytes(32)).decode())
    await (await house.shop()).wallet(1_000)
    given = [RELAY, "--since", f"{datetime.now(UTC) - 2 * AGAIN_MAX:%Y-%m-%d}", "--database-url", database_url]

    refused = await asyncio.to_thread(CliRunner().invoke, replay, given)
    sent = await asyncio.to_thread(CliRunner().invoke, replay, [*given, "--beyond-inboxes", "--json"])

    assert isinstance(refused.exception, RequestInvalid)
    assert f"{AGAIN_MAX.days} days" in str(refused.exception) and "--beyond-inboxes" in str(refused.exception)
    assert sent.exit_code == 0, sent.output
    assert json.loads(sent.stdout)["replayed"] > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--all", "--beyond-inboxes"), "goes with --since"),
        (("--beyond-inboxes",), "Say which"),
        (("--all", "--since", "2026-01-01"), "Say which"),
    ],
)
def test_flags_that_do_not_go_together_are_told(given: Sequence[str], says: str) -> None:
    found = CliRunner().invoke(replay, [RELAY, *given])

    assert found.exit_code == 2
    assert says in found.output
