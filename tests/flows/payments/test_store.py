"""What PostgreSQL gives back: pages, what is stuck, what lost its timer, and the story of a payment."""

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from flows.payments.house import HOME, PostgresBooks, Shop, inner
from kassa.db.queries import load
from kassa.payments.states import ATTEMPT_OPEN, PAYMENT_OPEN, REFUND_OPEN
from kassa.payments.store import PaymentStore
from kassa.payments.timeline import Timeline
from kassa.workers.payments import sweep

PAGE: dict[str, Any] = {"limit": 2, "order_id": None, "state": None, "created_from": None, "created_to": None}


@pytest.fixture(params=["postgres"])
def journal_url(request: pytest.FixtureRequest, database_url: str) -> str:
    """This file is about the database alone."""
    return database_url


@pytest.fixture
def store(shop: Shop) -> PaymentStore:
    """The shop's store."""
    assert isinstance(shop.reads, PaymentStore)
    return shop.reads


@pytest.fixture
def pool(shop: Shop) -> "asyncpg.Pool[asyncpg.Record]":
    """The shop's connections."""
    assert isinstance(shop.books, PostgresBooks)
    return shop.books.pool


async def test_pages_are_newest_first_and_filters_narrow_them(shop: Shop, store: PaymentStore) -> None:
    made = [await shop.order(100, order_id=f"o-{number}") for number in range(5)]

    first = await store.payments(HOME, "payment", before=None, **PAGE)
    second = await store.payments(HOME, "payment", before=first[-1][0].id, **PAGE)
    named = await store.payments(HOME, "payment", before=None, **(PAGE | {"order_id": "o-3"}))
    others = await store.payments(HOME + 1, "payment", before=None, **PAGE)
    topups = await store.payments(HOME, "topup", before=None, **PAGE)
    now = datetime.now(UTC)
    later = await store.payments(HOME, "payment", before=None, **(PAGE | {"created_from": now}))
    earlier = await store.payments(HOME, "payment", before=None, **(PAGE | {"created_to": now, "limit": 9}))

    assert [payment.order_id for payment, _ in (*first, *second)] == ["o-4", "o-3", "o-2", "o-1"]
    assert [payment.id for payment, _ in named] == [inner(made[3]["id"])]
    assert [len(attempts) for _, attempts in first] == [1, 1]
    assert (others, topups, later, len(earlier)) == ([], [], [], 5)


async def test_refunds_are_found_by_payment_and_by_order(
    shop: Shop, store: PaymentStore, pool: "asyncpg.Pool[asyncpg.Record]"
) -> None:
    payment = await shop.order(100, order_id="o-1")
    await shop.payer_pays(payment)
    await shop.until(payment["id"], "succeeded")
    refund = await shop.refund(payment["id"], 10)
    await shop.until_refund(refund["id"], "succeeded")

    by_payment = await store.refunds(HOME, payment=inner(payment["id"]), before=None, **PAGE)
    by_order = await store.refunds(HOME, payment=None, before=None, **(PAGE | {"order_id": "o-1"}))
    everything = await store.refunds(HOME, payment=None, before=None, **PAGE)

    assert by_payment == by_order == everything
    assert [found.id for found, _ in everything] == [inner(refund["id"])]
    await pool.execute("UPDATE claim SET kind = 'topup' WHERE kind = 'order'")
    assert everything == await store.refunds(HOME, payment=None, before=None, **(PAGE | {"order_id": "o-1"}))


async def test_a_second_payment_that_cannot_be_given_back_is_on_the_stuck_list(
    shop: Shop, store: PaymentStore, pool: "asyncpg.Pool[asyncpg.Record]"
) -> None:
    payment = await shop.order(100)
    await shop.payer_pays(payment)
    await shop.until(payment["id"], "succeeded")
    refund = await shop.refund(payment["id"], 10)
    await pool.execute(
        "UPDATE refund SET cause = 'duplicate', state = 'failed', failure_reason = 'no funds', doubt_since = now()"
    )

    (stuck,) = await store.stuck(HOME, datetime.now(UTC) - timedelta(minutes=1))

    assert [stuck] == await store.stuck(HOME, datetime.now(UTC) + timedelta(minutes=1))
    assert (stuck.noun, stuck.id, stuck.state, stuck.note) == ("refund", inner(refund["id"]), "failed", "no funds")


async def test_what_lost_its_timer_is_found_and_gets_one(
    shop: Shop, store: PaymentStore, pool: "asyncpg.Pool[asyncpg.Record]"
) -> None:
    payment = await shop.order(100)
    await pool.execute("DELETE FROM timer")
    assert await store.unarmed() == [(HOME, inner(payment["id"]))]

    assert await sweep(store, shop.payments) == 1

    assert await store.unarmed() == []


def test_the_states_in_the_queries_are_those_of_the_tables() -> None:
    queries = load("kassa.payments")

    for states in (PAYMENT_OPEN, ATTEMPT_OPEN, REFUND_OPEN):
        assert any(
            {f"'{state}'" for state in states} == set(part.split(")")[0].split(", "))
            for part in queries.unarmed.split("state IN (")[1:]
        ), states


async def test_doubt_is_on_the_stuck_list(shop: Shop, store: PaymentStore) -> None:
    await shop.fault("create", "status_5xx")
    payment = await shop.order(100)

    soon = datetime.now(UTC) + timedelta(minutes=1)
    (stuck,) = await store.stuck(HOME, soon)

    assert (stuck.noun, stuck.state, stuck.payment) == ("attempt", "unknown", inner(payment["id"]))
    assert await store.stuck(HOME + 1, soon) == []


async def test_the_story_of_a_payment_is_told_in_order(shop: Shop, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    payment = await shop.order(1000)
    await shop.payer_pays(payment)
    await shop.until(payment["id"], "succeeded")
    refund = await shop.refund(payment["id"], 300)
    await shop.until_refund(refund["id"], "succeeded")

    story = await Timeline(pool).of(HOME, inner(payment["id"]))

    assert story is not None
    kinds = [entry.kind for entry in story]
    assert kinds[:4] == ["created", "created", "request", "move"]
    assert {"callback", "posting", "event"} <= set(kinds)
    assert [entry.at for entry in story] == sorted(entry.at for entry in story)
    told = "\n".join(entry.text for entry in story)
    assert "attempt sending → pending_payer (accepted)" in told
    assert "payment: channel_receivable → merchant_payable 9.90 CNY" in told
    assert "settle refund: merchant_payable → channel_receivable 2.97 CNY" in told
    assert "refund.succeeded #4" in told
    assert await Timeline(pool).of(HOME + 1, inner(payment["id"])) is None
