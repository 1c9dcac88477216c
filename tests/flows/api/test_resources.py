"""Lists, statements, events and webhook endpoints: what each route shows, and what it refuses."""

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

from flows.api.support import House, Shop


async def pages(shop: Shop, path: str, **query: Any) -> list[list[dict[str, Any]]]:
    """All pages of a list."""
    found: list[list[dict[str, Any]]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await shop.get(path, **query, **cursor)).json()
        found.append(page["data"])
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


async def test_a_list_comes_in_pages_newest_first_and_complete(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    made = [(await shop.pay(wallet, 1)).json()["id"] for _ in range(5)]

    found = await pages(shop, "/v1/payments", limit=2)

    assert [len(page) for page in found] == [2, 2, 1]
    assert [payment["id"] for page in found for payment in page] == made[::-1]


async def test_a_list_is_narrowed_by_order_state_and_time(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    first = (await shop.pay(wallet, 1, order_id="first")).json()
    await asyncio.sleep(0.01)
    second = (await shop.pay(wallet, 1, order_id="second")).json()

    async def ids(**query: str) -> list[str]:
        return [payment["id"] for payment in (await shop.get("/v1/payments", **query)).json()["data"]]

    assert await ids(order_id="first") == [first["id"]]
    assert await ids(order_id="third") == []
    assert await ids(state="succeeded") == [second["id"], first["id"]]
    assert await ids(state="closed") == []
    assert await ids(created_from=second["created_at"]) == [second["id"]]
    assert await ids(created_to=second["created_at"]) == [first["id"]]


async def test_refunds_are_listed_with_their_payment(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    paid, other = [(await shop.pay(wallet, 100)).json() for _ in range(2)]
    made = [
        (await shop.post(f"/v1/payments/{paid['id']}/refunds", {"refund_id": f"r-{number}", "amount": 10})).json()
        for number in range(3)
    ]

    found = await pages(shop, "/v1/refunds", limit=2)

    assert [refund for page in found for refund in page] == made[::-1]
    assert {refund["payment"] for refund in made} == {paid["id"]}
    assert len((await shop.get("/v1/refunds", payment=paid["id"])).json()["data"]) == 3
    assert (await shop.get("/v1/refunds", payment=other["id"])).json()["data"] == []
    assert (await shop.get(f"/v1/refunds/{made[0]['id']}")).json() == made[0]


async def test_refusals_of_refunds_by_name(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    paid = (await shop.pay(wallet, 100)).json()
    path = f"/v1/payments/{paid['id']}/refunds"
    await shop.post(path, {"refund_id": "r-1", "amount": 10})

    taken = await shop.post(path, {"refund_id": "r-1", "amount": 10})
    more = await shop.post(path, {"refund_id": "r-2", "amount": 91})

    assert (taken.status_code, taken.json()["code"]) == (409, "refund.id_exists")
    assert (more.status_code, more.json()["code"]) == (409, "refund.exceeds_paid")


async def test_a_refund_that_the_merchants_balance_does_not_cover_is_refused_unless_it_may_go_below(
    house: House,
) -> None:
    shop = await house.shop(fee_ppm=100_000, fee_on_refund="kept")
    wallet = await shop.wallet(1000)
    paid = (await shop.pay(wallet, 1000)).json()
    path = f"/v1/payments/{paid['id']}/refunds"

    refused = await shop.post(path, {"refund_id": "r-1", "amount": 1000})
    await house.app.merchants.set_policies(shop.merchant.id, {"overdraft": 100})
    covered = await shop.post(path, {"refund_id": "r-1", "amount": 1000})

    assert (refused.status_code, refused.json()["code"]) == (402, "refund.insufficient_balance")
    assert covered.status_code == 201, covered.text
    (balance,) = (await shop.get("/v1/balances")).json()["data"]
    assert (balance["balance"], balance["fees"]) == (-100, 100)


async def test_a_statement_has_no_gaps_and_adds_up(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    paid = (await shop.pay(wallet, 500)).json()
    await shop.post(f"/v1/payments/{paid['id']}/refunds", {"refund_id": "r-1", "amount": 100})

    lines = [line for page in await pages(shop, f"/v1/wallets/{wallet}/statement", limit=2) for line in page]

    assert [line["version"] for line in lines] == list(range(len(lines), 0, -1))
    assert lines[0]["balance"] == sum(line["amount"] for line in lines) == 600
    for newer, older in itertools.pairwise(lines):
        assert newer["balance"] == older["balance"] + newer["amount"]
    assert {line["resource"] for line in lines[:-1]} == {paid["id"]}
    assert [line["kind"] for line in lines[::-1]][:3] == ["topup", "payment", "fee"]


async def test_a_merchant_with_one_currency_need_not_name_it(house: House, shop: Shop) -> None:
    none = await (await house.shop()).get("/v1/balances/statement")
    paid = (await shop.pay(await shop.wallet(1000), 200)).json()
    one = await shop.get("/v1/balances/statement")
    await shop.pay(await shop.wallet(1000, "USD"), 100, currency="USD")
    two = await shop.get("/v1/balances/statement")

    assert (none.status_code, none.json()["data"]) == (200, [])
    assert [line["resource"] for line in one.json()["data"]] == [paid["id"]]
    assert (two.status_code, two.json()["errors"][0]["field"]) == (400, "currency")
    assert "CNY, USD" in two.json()["errors"][0]["message"]


async def test_the_merchants_statement_adds_up_to_its_balance(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    for _ in range(3):
        await shop.pay(wallet, 100)

    (balance,) = (await shop.get("/v1/balances")).json()["data"]
    lines = (await shop.get("/v1/balances/statement", currency="CNY")).json()["data"]
    fees = (await shop.get("/v1/balances/statement", currency="CNY", account="fee_income")).json()["data"]

    assert balance["balance"] == lines[0]["balance"] == 297
    assert balance["fees"] == fees[0]["balance"] == 3


async def test_a_balance_of_the_past_can_be_read(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    await shop.pay(wallet, 100)
    await asyncio.sleep(0.01)
    then = datetime.now(UTC)
    await asyncio.sleep(0.01)
    await shop.pay(wallet, 100)

    (past,) = (await shop.get("/v1/balances", at=then.isoformat())).json()["data"]
    (before,) = (await shop.get("/v1/balances", at=(then - timedelta(days=1)).isoformat())).json()["data"]

    assert (past["balance"], past["fees"], before["balance"]) == (99, 1, 0)


async def test_a_wallet_in_another_currency_is_not_found_by_a_payment(shop: Shop) -> None:
    wallet = await shop.wallet(1000, "USD")

    refused = await shop.pay(wallet, 100)

    assert (refused.status_code, refused.json()["code"]) == (404, "wallet.not_found")


async def test_events_are_listed_with_the_object_as_it_was(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    paid = (await shop.pay(wallet, 100)).json()
    await shop.post(f"/v1/payments/{paid['id']}/refunds", {"refund_id": "r-1", "amount": 10})

    found = [event for page in await pages(shop, "/v1/events", limit=2) for event in page]

    of_payment = [event for event in found if event["root"] == paid["id"]][::-1]
    assert [event["sequence"] for event in of_payment] == list(range(1, len(of_payment) + 1))
    assert (of_payment[0]["type"], of_payment[0]["data"]) == ("payment.succeeded", paid)
    narrowed = (await shop.get("/v1/events", type="refund.*")).json()["data"]
    assert narrowed
    assert all(event["type"].startswith("refund.") for event in narrowed)
    assert (await shop.get("/v1/events", created_from="2100-01-01T00:00:00Z")).json()["data"] == []


async def test_the_life_of_a_webhook_endpoint(shop: Shop) -> None:
    body = {"url": "http://127.0.0.1:9/hook", "events": ["payment.*", "*"], "description": "till"}

    made = await shop.post("/v1/webhook_endpoints", body, key="k")
    again = await shop.post("/v1/webhook_endpoints", body, key="k")
    path = f"/v1/webhook_endpoints/{made.json()['id']}"
    patched = await shop.http.patch(path, json={"state": "disabled", "events": ["refund.*"]})
    rotated = await shop.post(f"{path}/rotate_secret")
    shown = await shop.get(path)
    gone = await shop.http.delete(path)

    assert made.status_code == 201, made.text
    assert made.json()["secret"].startswith("whsec_")
    assert (again.json(), again.headers["idempotent-replayed"]) == (made.json(), "true")
    assert (patched.json()["state"], patched.json()["events"]) == ("disabled", ["refund.*"])
    assert rotated.json()["secret"] not in ("", made.json()["secret"])
    assert "secret" not in shown.json()
    assert (gone.status_code, gone.content) == (204, b"")
    for answer in (await shop.get(path), await shop.http.delete(path), await shop.post(f"{path}/rotate_secret")):
        assert (answer.status_code, answer.json()["code"]) == (404, "webhook_endpoint.not_found")


async def test_deliveries_are_listed_and_sent_again(shop: Shop) -> None:
    made = await shop.post("/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/hook", "events": ["payment.*"]})
    path = f"/v1/webhook_endpoints/{made.json()['id']}"
    paid = (await shop.pay(await shop.wallet(1000), 100)).json()
    (event,) = (await shop.get("/v1/events", type="payment.succeeded")).json()["data"]
    for _ in range(2400):
        deliveries = (await shop.get(f"{path}/deliveries")).json()["data"]
        if deliveries and deliveries[0]["tries"]:
            break
        await asyncio.sleep(0.05)

    again = await shop.post(f"/v1/events/{event['id']}/redeliver")
    replay = await shop.post(
        f"{path}/replay", {"created_from": "2020-01-01T00:00:00Z", "created_to": "2100-01-01T00:00:00Z"}
    )
    backwards = await shop.post(
        f"{path}/replay", {"created_from": "2100-01-01T00:00:00Z", "created_to": "2020-01-01T00:00:00Z"}
    )

    assert (deliveries[0]["event"], deliveries[0]["type"], deliveries[0]["state"]) == (
        event["id"],
        "payment.succeeded",
        "due",
    )
    assert deliveries[0]["last_error"]
    assert event["data"]["id"] == paid["id"]
    assert (again.status_code, len(again.json()["data"])) == (202, 1)
    assert (replay.status_code, replay.json()["endpoint"]) == (202, made.json()["id"])
    assert (backwards.status_code, backwards.json()["errors"][0]["field"]) == (400, "created_to")
    assert (await shop.post("/v1/events/evt_x/redeliver")).json()["code"] == "event.not_found"


async def test_things_that_do_not_exist_are_not_found(shop: Shop) -> None:
    nothing = "0" * 32
    for path, code in (
        ("payments/pay_", "payment"), ("topups/top_", "topup"), ("refunds/rfd_", "refund"), ("wallets/wal_", "wallet"),
        ("webhook_endpoints/whe_", "webhook_endpoint"), ("payments/top_", "payment"), ("payments/%00", "payment"),
        ("payments/" + "x" * 200 + "_", "payment"), ("payments/päy_", "payment"),
    ):  # fmt: skip
        answer = await shop.get(f"/v1/{path}{nothing}")
        assert answer.status_code == 404, path
        assert answer.json()["code"] in (f"{code}.not_found", "request.not_found"), path
