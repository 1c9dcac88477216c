"""Keys and channels in memory: quick, bounded, and never believed for longer than two seconds."""

from collections.abc import Sequence
from typing import Any

import pytest

from kassa.channels.registry import Opened
from kassa.clock import FrozenClock
from kassa.errors import ChannelNotFound, DatabaseUnreachable
from kassa.ids import Id, new_id
from kassa.merchants import directory as module
from kassa.merchants import model
from kassa.merchants.directory import Directory
from kassa.merchants.model import ALL_SCOPES, Caller, hash_key
from kassa.merchants.records import ChannelAccount, Merchant
from kassa.merchants.vault import Vault

NOW = FrozenClock().now()
VAULT = Vault(b"k" * 32)


class MemoryMerchants:
    """What the directory reads, without a database."""

    def __init__(self) -> None:
        self.keys: dict[bytes, Caller] = {}
        self.accounts: dict[tuple[int, str], ChannelAccount] = {}
        self.reads = 0
        self.is_away = False

    def shop(self, home: int) -> str:
        merchant: Merchant = model.create(home, new_id(), "Shop", {}, NOW).result
        key = model.new_key()
        self.keys[hash_key(key)] = Caller(merchant, new_id(), ALL_SCOPES)
        return key

    def account(self, home: int, channel: str, secret: str, version: int = 0) -> None:
        sealed = VAULT.seal(home, channel, b'{"secret":"' + secret.encode() + b'"}')
        self.accounts[home, channel] = ChannelAccount(
            home=home, id=new_id(), version=version, root=new_id(), state="active", channel=channel, created_at=NOW,
            credentials=sealed, updated_at=NOW,
        )  # fmt: skip

    def _read(self) -> None:
        self.reads += 1
        if self.is_away:
            raise ConnectionRefusedError

    async def callers(self, hashes: Sequence[bytes]) -> dict[bytes, Caller]:
        self._read()
        return {digest: self.keys[digest] for digest in hashes if digest in self.keys}

    async def channel_account(self, home: int, channel: str) -> ChannelAccount | None:
        self._read()
        return self.accounts.get((home, channel))

    async def channel_versions(self, homes: Sequence[int]) -> dict[tuple[int, str], int]:
        self._read()
        return {name: account.version for name, account in self.accounts.items() if name[0] in homes}

    async def merchant(self, merchant_id: Id) -> Merchant | None:
        self._read()
        return next((held.merchant for held in self.keys.values() if held.merchant.id == merchant_id), None)


class Seconds:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A directory over memory."""

    def __init__(self) -> None:
        self.store = MemoryMerchants()
        self.seconds = Seconds()
        self.made: list[str] = []
        self.directory = Directory(self.store, VAULT, self._make, self.seconds)

    def _make(self, name: str, credentials: dict[str, Any]) -> Opened:
        self.made.append(credentials["secret"])
        return Opened(object(), credentials["secret"])  # type: ignore[arg-type]


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_a_key_is_read_once_and_then_known(bench: Bench) -> None:
    key = bench.store.shop(7)

    assert bench.directory.known(key) is None
    caller = await bench.directory.caller(key)

    assert caller is not None
    assert caller.merchant.home == 7
    assert bench.directory.known(key) is caller
    assert bench.store.reads == 1


async def test_a_wrong_key_is_nobodys_and_costs_one_query(bench: Bench) -> None:
    for _ in range(10):
        assert await bench.directory.caller("sk_wrong") is None

    assert bench.store.reads == 1


async def test_what_is_older_than_two_seconds_is_not_believed(bench: Bench) -> None:
    key = bench.store.shop(7)
    await bench.directory.caller(key)
    bench.store.keys.clear()

    bench.seconds.now += 1.9
    assert bench.directory.known(key) is not None
    bench.seconds.now += 0.2
    assert bench.directory.known(key) is None
    assert await bench.directory.caller(key) is None


async def test_a_revoked_key_is_forgotten_at_once(bench: Bench) -> None:
    key = bench.store.shop(7)
    await bench.directory.caller(key)

    bench.directory.forget_key(hash_key(key))

    assert bench.directory.known(key) is None
    assert await bench.directory.caller(key) is None


async def test_what_another_process_announced_is_asked_again(bench: Bench) -> None:
    key, other = bench.store.shop(7), bench.store.shop(8)
    await bench.directory.caller(key)
    await bench.directory.caller(other)

    bench.directory.heard("7")
    bench.directory.heard("not a home")

    assert bench.directory.known(key) is None
    assert bench.directory.known(other) is not None


async def test_nothing_is_believed_when_the_database_is_away_for_long(bench: Bench) -> None:
    key = bench.store.shop(7)
    await bench.directory.caller(key)
    bench.store.is_away = True
    bench.seconds.now += 3

    with pytest.raises(DatabaseUnreachable):
        await bench.directory.caller(key)

    bench.store.is_away = False
    assert await bench.directory.caller(key) is not None


async def test_guessing_keys_does_not_fill_the_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_MAX", 50)
    key = bench.store.shop(7)
    await bench.directory.caller(key)

    for number in range(500):
        await bench.directory.caller(f"sk_{number}")

    assert len(bench.directory._keys) <= 50
    assert bench.directory.known(key) is not None


async def test_a_channel_is_made_once_and_again_when_its_credentials_change(bench: Bench) -> None:
    bench.store.account(7, "wechat", "one")
    for _ in range(3):
        assert (await bench.directory.for_merchant(7, "wechat")).base_url == "one"
    bench.store.account(7, "wechat", "two", version=1)

    await bench.directory.refresh()

    assert (await bench.directory.for_merchant(7, "wechat")).base_url == "two"
    assert bench.made == ["one", "two"]


async def test_a_channel_that_learnt_new_keys_is_used_from_then_on(bench: Bench) -> None:
    bench.store.account(7, "wechat", "one")
    await bench.directory.for_merchant(7, "wechat")
    fresh: Any = object()

    bench.directory.learn(7, "wechat", fresh)

    assert (await bench.directory.for_merchant(7, "wechat")).channel is fresh


async def test_a_merchant_without_the_channel_is_told(bench: Bench) -> None:
    with pytest.raises(ChannelNotFound):
        await bench.directory.for_merchant(7, "wechat")


async def test_a_home_is_found_by_the_merchants_id(bench: Bench) -> None:
    key = bench.store.shop(7)
    caller = await bench.directory.caller(key)
    assert caller is not None

    assert await bench.directory.home_of(caller.merchant.id) == 7
    assert await bench.directory.home_of(new_id()) is None
