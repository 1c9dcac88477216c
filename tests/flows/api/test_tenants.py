"""One merchant can never see, close, refund or replay another's things: every route is tried. And what keys may do."""

from typing import Any

import pytest

from flows.api.support import House, Shop
from flows.wechat_sandbox import SandboxProcess
from kassa.api.http import Router
from kassa.merchants.model import Scope

REDIRECTED = {
    # What a POST needs so that only whose thing it is can be the reason to refuse it.
    "/v1/payments/{id}/close": {},
    "/v1/payments/{id}/attempts": {"channel": "wechat", "method": "native"},
    "/v1/payments/{id}/resolve": {"decision": "refund", "reason": "mine"},
    "/v1/payments/{id}/refunds": {"refund_id": "theirs", "amount": 1},
    "/v1/topups/{id}/close": {},
    "/v1/topups/{id}/attempts": {"channel": "wechat", "method": "native"},
    "/v1/topups/{id}/resolve": {"decision": "refund", "reason": "mine"},
    "/v1/topups/{id}/refunds": {"refund_id": "theirs", "amount": 1},
    "/v1/events/{id}/redeliver": {},
    "/v1/webhook_endpoints/{id}": {"description": "mine"},
    "/v1/webhook_endpoints/{id}/rotate_secret": {},
    "/v1/webhook_endpoints/{id}/replay": {
        "created_from": "2020-01-01T00:00:00Z", "created_to": "2040-01-01T00:00:00Z",
    },
}  # fmt: skip


async def things_of(shop: Shop) -> dict[str, str]:
    """One of each, by the noun in its path. The shop has a channel, and so has the thief: that is not what stops him."""
    wallet = await shop.wallet(1000)
    paid = (await shop.pay(wallet, 100, order_id="theirs")).json()
    refund = (await shop.post(f"/v1/payments/{paid['id']}/refunds", {"refund_id": "r", "amount": 10})).json()
    way = {"currency": "CNY", "channel": "wechat", "method": "native"}
    topup = (await shop.post("/v1/topups", {"order_id": "theirs", "wallet": wallet, "amount": 5, **way})).json()
    endpoint = await shop.post("/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/hook", "events": ["*"]})
    event = (await shop.get("/v1/events")).json()["data"][0]["id"]
    return {
        "payments": paid["id"],
        "topups": topup["id"],
        "refunds": refund["id"],
        "wallets": wallet,
        "events": event,
        "webhook_endpoints": endpoint.json()["id"],
    }


async def test_no_route_reaches_another_merchants_things(house: House, sandbox: SandboxProcess) -> None:
    owner, thief = await house.shop(), await house.shop()
    for shop in (owner, thief):
        await house.app.merchants.set_channel(shop.merchant.id, "wechat", sandbox.credentials)
    things = await things_of(owner)
    before = [await owner.get(f"/v1/{noun}/{name}") for noun, name in things.items() if noun != "events"]
    tried = 0

    for route in house.api.routes:
        if "{id}" not in route.pattern:
            continue
        path = route.pattern.replace("{id}", things[route.pattern.split("/")[2]])
        body = REDIRECTED.get(route.pattern)
        answer = await thief.http.request(route.method, path, json=body, headers={"Idempotency-Key": f"steal-{tried}"})
        tried += 1
        assert (answer.status_code, answer.json()["code"].rpartition(".")[2]) == (404, "not_found"), (path, answer.text)
        assert "theirs" not in answer.text

    assert tried >= 20
    after = [await owner.get(f"/v1/{noun}/{name}") for noun, name in things.items() if noun != "events"]
    assert {answer.status_code for answer in before} == {200}
    assert [answer.json() for answer in after] == [answer.json() for answer in before]


async def test_no_list_shows_another_merchants_things(house: House, sandbox: SandboxProcess) -> None:
    owner, thief = await house.shop(), await house.shop()
    await house.app.merchants.set_channel(owner.merchant.id, "wechat", sandbox.credentials)
    things = await things_of(owner)

    for path in ("/v1/payments", "/v1/topups", "/v1/refunds", "/v1/events", "/v1/webhook_endpoints", "/v1/balances"):
        assert (await thief.get(path)).json()["data"] == [], path
    assert (await thief.get("/v1/payments", order_id="theirs")).json()["data"] == []
    assert (await thief.get("/v1/refunds", payment=things["payments"])).json()["data"] == []
    assert (await thief.get("/v1/balances/statement", currency="CNY")).json()["data"] == []


async def test_another_merchants_cursor_shows_nothing_of_theirs(house: House) -> None:
    owner, thief = await house.shop(), await house.shop()
    wallet = await owner.wallet(1000)
    for _ in range(3):
        await owner.pay(wallet, 1)
    cursors = [(await owner.get(path, limit=1)).json()["next_cursor"] for path in ("/v1/payments", "/v1/events")]

    for path, cursor in zip(("/v1/payments", "/v1/events"), cursors, strict=True):
        assert (await thief.get(path, cursor=cursor)).json()["data"] == []


async def test_nobody_pays_from_another_merchants_wallet(house: House) -> None:
    owner, thief = await house.shop(), await house.shop()
    wallet = await owner.wallet(1000)

    answer = await thief.pay(wallet, 100)
    topup = await thief.post(
        "/v1/topups",
        {"order_id": "t", "wallet": wallet, "amount": 1, "currency": "CNY", "channel": "wechat", "method": "native"},
    )

    assert (answer.status_code, answer.json()["code"]) == (404, "wallet.not_found")
    assert (topup.status_code, topup.json()["code"]) == (404, "wallet.not_found")
    assert (await owner.get(f"/v1/wallets/{wallet}")).json()["balance"] == 1000


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer sk_wrong", "bearer sk_x", "Basic c2s6", "Bearer a b"])
async def test_every_route_but_meta_and_callbacks_asks_for_a_key(house: House, header: str | None) -> None:
    for route in house.api.routes:
        if route.scope is None:
            continue
        path = route.pattern.replace("{id}", "x")
        answer = await house.http.request(
            route.method, path, headers={} if header is None else {"Authorization": header}
        )
        assert (answer.status_code, answer.json()["code"]) == (401, "auth.invalid"), path
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_routes_without_a_key_are_only_these(house: House) -> None:
    free = {route.pattern for route in house.api.routes if route.scope is None}

    assert free == {"/healthz", "/readyz", "/metrics", "/v1/callbacks/{channel}/{merchant}"}


async def test_a_revoked_key_is_refused_at_once(house: House, shop: Shop) -> None:
    assert (await shop.get("/v1/payments")).status_code == 200
    (key,) = await house.app.merchants.keys(shop.merchant.id)

    await house.app.merchants.revoke_key(key.id)

    assert (await shop.get("/v1/payments")).status_code == 401
    await house.app.directory.refresh()
    assert (await shop.get("/v1/payments")).status_code == 401


SCOPED: list[tuple[str, str, str, dict[str, Any] | None, bool]] = [
    ("read", "GET", "/v1/payments", None, True),
    ("read", "GET", "/v1/balances", None, True),
    ("read", "POST", "/v1/payments", {}, False),
    ("read", "POST", "/v1/wallets", {}, False),
    ("read", "POST", "/v1/webhook_endpoints", {}, False),
    ("payments", "GET", "/v1/payments", None, True),
    ("payments", "POST", "/v1/payments", {}, True),
    ("payments", "POST", "/v1/payments/x/refunds", {}, False),
    ("payments", "GET", "/v1/balances", None, False),
    ("refunds", "POST", "/v1/payments/x/refunds", {}, True),
    ("refunds", "POST", "/v1/payments", {}, False),
    ("wallets", "POST", "/v1/wallets", {}, True),
    ("wallets", "POST", "/v1/topups", {}, True),
    ("webhooks", "GET", "/v1/events", None, True),
    ("webhooks", "GET", "/v1/payments", None, False),
    ("read webhooks", "POST", "/v1/webhook_endpoints", {}, True),
]


@pytest.mark.parametrize(("scopes", "method", "path", "body", "may"), SCOPED)
async def test_a_key_may_do_what_its_scopes_say(
    house: House, scopes: str, method: str, path: str, body: dict[str, Any] | None, may: bool
) -> None:
    shop = await house.shop(scopes=scopes)

    answer = await shop.http.request(method, path, json=body)

    assert (answer.status_code != 403) is may
    assert may or answer.json()["code"] == "auth.forbidden"


async def test_every_scope_is_used_by_some_route(house: House) -> None:
    used = 0
    for route in house.api.routes:
        used |= route.scope or 0

    assert all(used & scope for scope in Scope)


async def test_the_document_names_every_route_and_no_other(house: House) -> None:
    router = Router()
    for route in house.api.routes:
        router.add(route.method, route.pattern, lambda request: None)  # type: ignore[arg-type,return-value]
    written = {(method.upper(), path) for path, methods in house.api.document["paths"].items() for method in methods}

    assert written == set(router.routes())
