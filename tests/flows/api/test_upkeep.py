"""Holds that expire, answers that were kept long enough, anchors; and secrets that nobody finds in the database."""

from datetime import UTC, datetime, timedelta

import pytest

from flows.api.support import House, Shop
from flows.wechat_sandbox import SandboxProcess
from kassa.clock import SystemClock
from kassa.errors import SettingInvalid
from kassa.ids import Id, new_id
from kassa.journal.change import Change, Committed
from kassa.ledger import chart
from kassa.ledger.chart import Posting
from kassa.ledger.model import HoldKey, hold, settle
from kassa.workers.loops import supervisor
from kassa.workers.upkeep import anchor, drop_old_answers, release_expired_holds


async def test_an_expired_hold_is_given_back_once(house: House, shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    home, key = shop.merchant.home, HoldKey(new_id(), 0)
    source, target = chart.wallet(home, Id(wallet[4:]), "CNY"), chart.payable(home, "CNY")
    soon = datetime.now(UTC) + timedelta(milliseconds=1)
    change = Change(home=home, root=key.id, transfers=(hold(Posting.PAYMENT, source, target, 300, key, soon),))
    assert isinstance(await house.app.journal.commit(change), Committed)
    assert (await shop.get(f"/v1/wallets/{wallet}")).json()["available"] in (700, 1000)

    await release_expired_holds(house.app.pool, house.app.journal)
    again = await release_expired_holds(house.app.pool, house.app.journal)

    assert again == 0
    money = (await shop.get(f"/v1/wallets/{wallet}")).json()
    assert (money["balance"], money["available"]) == (1000, 1000)
    late = await house.app.journal.commit(Change(home=home, root=key.id, transfers=(settle(Posting.PAYMENT, key),)))
    assert not isinstance(late, Committed)


async def test_answers_are_dropped_after_their_time_and_order_numbers_never(house: House, shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    await shop.pay(wallet, 100, key="k", order_id="o-1")

    kept = await drop_old_answers(house.app.pool, timedelta(days=8))
    dropped = await drop_old_answers(house.app.pool, timedelta(0))

    assert (kept, dropped >= 1) == (0, True)
    again = await shop.pay(wallet, 100, key="k", order_id="o-1")
    assert (again.status_code, again.json()["code"]) == (409, "payment.order_exists")


async def test_the_heads_are_signed(house: House, shop: Shop) -> None:
    await shop.wallet(10)

    first = await anchor(house.app.pool, b"a" * 32, SystemClock())
    second = await anchor(house.app.pool, b"a" * 32, SystemClock())

    assert second == first + 1


async def test_no_credential_and_no_key_is_in_the_database(
    house: House, wechat_shop: Shop, sandbox: SandboxProcess
) -> None:
    made = await wechat_shop.post("/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/hook", "events": ["*"]})
    secrets = [
        sandbox.credentials["apiv3_key"],
        sandbox.credentials["merchant_private_key_pem"].splitlines()[1],
        wechat_shop.key,
        made.json()["secret"].removeprefix("whsec_"),
    ]
    tables = await house.app.pool.fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )

    for table in tables:
        rows = await house.app.pool.fetch(f'SELECT t::text AS line FROM "{table["relname"]}" t')
        for row in rows:
            for secret in secrets:
                assert secret not in row["line"], table["relname"]
                assert secret.encode().hex() not in row["line"], table["relname"]


async def test_a_worker_that_does_not_exist_is_refused_by_name(house: House) -> None:
    with pytest.raises(SettingInvalid, match="tea"):
        supervisor(house.app, ["payments", "tea"])
