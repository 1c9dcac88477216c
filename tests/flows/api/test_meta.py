"""Health that tells the truth, numbers, the document and its page; and a database that goes away and comes back."""

import asyncio

from flows.api.support import House, Shop, running
from kassa.db import embedded
from kassa.db.migrate import migrate


async def test_a_healthy_house_is_alive_and_ready(house: House) -> None:
    alive, ready = await house.http.get("/healthz"), await house.http.get("/readyz")

    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    assert ready.status_code == 200, ready.text
    assert {check["name"]: check["ok"] for check in ready.json()["checks"]} == {
        "database": True,
        "journal": True,
        "workers": True,
    }


async def test_a_worker_that_does_not_run_is_told(database_url: str) -> None:
    async with running(database_url) as house:
        house.api._idle_workers = lambda: ["webhooks"]

        ready = await house.http.get("/readyz")

    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert "webhooks" in ready.text


async def test_a_database_that_lacks_migrations_is_told(house: House) -> None:
    await house.app.pool.execute(
        "DELETE FROM schema_migration WHERE number = (SELECT max(number) FROM schema_migration)"
    )

    ready = await house.http.get("/readyz")

    assert ready.status_code == 503
    assert "migrat" in ready.text


async def test_numbers_are_counted_by_route_and_not_by_path(shop: Shop) -> None:
    paid = (await shop.pay(await shop.wallet(100), 10)).json()
    await shop.get(f"/v1/payments/{paid['id']}")

    page = (await shop.http.get("/metrics")).text

    assert 'route="/v1/payments/{id}"' in page
    assert paid["id"] not in page
    assert "kassa_journal_batch_size_count" in page
    assert shop.key not in page


async def test_the_docs_page_needs_nothing_from_elsewhere(house: House) -> None:
    page = await house.http.get("/docs")
    script, style = await house.http.get("/docs/docs.js"), await house.http.get("/docs/docs.css")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for text in (page.text, script.text, style.text):
        assert "http://" not in text
        assert "https://" not in text
    document = (await house.http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    assert document["paths"]["/v1/payments"]["post"]["requestBody"]["content"]["application/json"]["example"]


async def test_a_database_that_goes_away_is_told_and_its_return_needs_no_restart() -> None:
    with embedded.temporary_directory("kassa-api-") as directory:
        server = await asyncio.to_thread(embedded.start, directory, settings={"fsync": "off"})
        try:
            await migrate(server.dsn)
            async with running(server.dsn) as house:
                shop = await house.shop()
                wallet = await shop.wallet(1000)
                assert (await shop.pay(wallet, 100, order_id="before", key="before")).status_code == 201
                await asyncio.to_thread(embedded.stop, server)

                alive, ready = await house.http.get("/healthz"), await house.http.get("/readyz")
                read, paid = await asyncio.gather(
                    shop.get("/v1/payments"), shop.pay(wallet, 100, order_id="during", key="during")
                )

                assert (alive.status_code, ready.status_code, ready.json()["ready"]) == (200, 503, False)
                assert read.status_code == 503, read.text
                assert (paid.status_code, paid.json()["outcome"], paid.json()["retryable"]) == (503, "unknown", True)
                assert paid.headers["retry-after"]

                await asyncio.to_thread(embedded.start, directory, settings={"fsync": "off"})
                for _ in range(200):
                    ready = await house.http.get("/readyz")
                    if ready.status_code == 200:
                        break
                    await asyncio.sleep(0.1)
                assert ready.json()["ready"], ready.text
                again = await shop.pay(wallet, 100, order_id="during", key="during")
                before = await shop.pay(wallet, 100, order_id="before", key="before")
                assert (again.status_code, before.headers.get("idempotent-replayed")) == (201, "true")
                assert (await shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 800
        finally:
            await asyncio.to_thread(embedded.stop, server)
