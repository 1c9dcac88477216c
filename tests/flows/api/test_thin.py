"""The shortest way through the house: a key, a wallet, a payment, and reading it back."""

from flows.api.support import running


async def test_a_payment_from_a_wallet_is_final_and_can_be_read(database_url: str) -> None:
    async with running(database_url) as house:
        shop = await house.shop(fee_ppm=6000)
        wallet = await shop.wallet(1000)

        paid = await shop.pay(wallet, 500, description="Two coffees", metadata={"table": "7"})

        assert paid.status_code == 201, paid.text
        payment = paid.json()
        assert (payment["state"], payment["amount"], payment["fee"]) == ("succeeded", 500, 3)
        assert payment["metadata"] == {"table": "7"}
        read = await shop.get(f"/v1/payments/{payment['id']}")
        assert (read.status_code, read.json()) == (200, payment)
        money = await shop.get(f"/v1/wallets/{wallet}")
        assert (money.json()["balance"], money.json()["available"]) == (500, 500)
