"""Health that tells the truth, numbers, the document and its page; and a database that goes away and comes back."""

import asyncio

from flows.api.support import House, Shop, running
from flows.wechat_sandbox import SandboxProcess
from kassa.db import embedded
from kassa.db.migrate import migrate
from kassa.db.pool import connect


async def test_a_healthy_house_is_alive_and_ready(house: House) -> None:
    alive, ready = await house.http.get("/healthz"), await house.http.get("/readyz")

    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    assert ready.status_code == 200, ready.text
    assert {check["name"]: check["ok"] for check in ready.json()["checks"]} == {
        "database": True,
        "clock": True,
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

                page = (await house.http.get("/metrics")).text

                assert (alive.status_code, ready.status_code, ready.json()["ready"]) == (200, 503, False)
                assert "kassa_database_up 0.0" in page.splitlines()
                assert "\nkassa_in_doubt{" not in page
                assert read.status_code == 503, read.text
                assert (paid.status_code, paid.json()["outcome"], paid.json()["retryable"]) == (503, "unknown", True)
                assert paid.headers["retry-after"]

                await asyncio.to_thread(embedded.start, directory, settings={"fsync": "off"})
                for _ in range(1200):
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


async def test_a_journal_that_stands_still_or_is_full_is_told_and_goes_on(database_url: str) -> None:
    """The database answers, but nothing can be committed: that is not ready, whatever `SELECT 1` says."""
    async with running(database_url, journal_queue_max=2) as house:
        shop = await house.shop()
        wallet = await shop.wallet(1000)
        blocker = await connect(database_url, application="test blocker")
        await blocker.execute("BEGIN; LOCK TABLE chain IN ACCESS EXCLUSIVE MODE")
        stuck = [asyncio.create_task(shop.pay(wallet, 100, order_id="o-0", key="k-0"))]
        # What is seen to wait at first may be a change that has nothing to write.
        for _ in range(600):
            standing = await house.http.get("/readyz")
            if standing.status_code == 503:
                break
            await asyncio.sleep(0.1)

        numbers = (await house.http.get("/metrics")).text
        for number in range(1, 8):
            stuck.append(asyncio.create_task(shop.pay(wallet, 100, order_id=f"o-{number}", key=f"k-{number}")))
            await asyncio.sleep(0.05)
        await asyncio.wait(stuck, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        full = await house.http.get("/readyz")
        refused = [await task for task in stuck if task.done()]
        await blocker.execute("ROLLBACK")
        paid = [await task for task in stuck if task.done() is False]
        ready = await house.http.get("/readyz")
        await blocker.close()

    assert (standing.status_code, standing.json()["ready"]) == (503, False)
    assert "none was written" in standing.text
    assert "kassa_journal_queue_length 1.0" in numbers
    assert full.status_code == 503 and "no more are taken" in full.text
    assert refused and {(answer.status_code, answer.json()["code"]) for answer in refused} == {(503, "system.busy")}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert paid and {answer.status_code for answer in paid} == {201}
    assert ready.status_code == 200, ready.text


async def test_a_loop_that_was_ended_is_told(database_url: str) -> None:
    async with running(database_url) as house:
        before = await house.http.get("/readyz")
        (directory,) = [task for task in asyncio.all_tasks() if task.get_name() == "worker directory"]
        directory.cancel()
        await asyncio.wait([directory])

        after = await house.http.get("/readyz")
        page = (await house.http.get("/metrics")).text

    assert (before.status_code, after.status_code) == (200, 503)
    assert "directory" in after.text
    assert "kassa_workers_idle 1.0" in page


async def test_the_numbers_say_what_waits_and_what_was_told(
    house: House, wechat_shop: Shop, sandbox: SandboxProcess
) -> None:
    shop = wechat_shop
    await asyncio.to_thread(sandbox.fault, "create", "drop_after", times=1)
    # It stays in doubt, however long the look at the numbers takes.
    await asyncio.to_thread(sandbox.fault, "query", "drop_after", times=100)
    await shop.post("/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/none", "events": ["*"]})
    order = {"amount": 100, "currency": "CNY", "channel": "wechat", "method": "native", "description": "tea"}

    made = await shop.post("/v1/payments", {"order_id": "o-1", **order})
    for _ in range(2400):
        page = (await house.http.get("/metrics")).text
        if 'kassa_webhook_deliveries_total{result="failed"}' in page:
            break
        await asyncio.sleep(0.05)

    assert made.json()["attempts"][0]["state"] == "unknown"
    for line in (
        'kassa_channel_calls_total{channel="wechat",operation="create",outcome="unknown"} 1.0',
        'kassa_in_doubt{noun="attempt"} 1.0',
        'kassa_in_doubt{noun="refund"} 0.0',
        "kassa_database_up 1.0",
        "kassa_workers_idle 0.0",
    ):
        assert line in page.splitlines()
    assert 'kassa_webhook_deliveries_total{result="failed"}' in page
    assert 'kassa_queue_latency_seconds_count{group="webhooks",topic="kassa.events"}' in page


async def test_a_transaction_that_somebody_leaves_open_is_in_the_numbers(house: House, database_url: str) -> None:
    """Those of a moment are too; this one stays."""

    async def oldest_s() -> float:
        page = (await house.http.get("/metrics")).text
        (line,) = [one for one in page.splitlines() if one.startswith("kassa_database_oldest_transaction_seconds ")]
        return float(line.split()[1])

    holder = await connect(database_url, application="left open")
    held = holder.transaction(isolation="repeatable_read")
    await held.start()
    await holder.fetchval("SELECT 1")
    # Its age is what is counted.
    await asyncio.sleep(2)
    beside = await oldest_s()
    await held.rollback()
    await holder.close()

    assert beside >= 2
    # The page may have the last look's number for a while.
    for _ in range(600):
        if (after := await oldest_s()) < 2:
            break
        await asyncio.sleep(0.1)
    assert after < 2
