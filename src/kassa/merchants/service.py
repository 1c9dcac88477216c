"""What operators do with merchants: create, set policies, give out and revoke keys, keep channel credentials."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import msgspec

from kassa.errors import ApiKeyNotFound, InvariantBroken, KassaError, MerchantNotFound
from kassa.ids import Id, new_id
from kassa.journal.change import SYSTEM_HOME, Aggregate, Change, Committed, Missing, Refused, Rule, Verdict
from kassa.journal.journal import Journal
from kassa.merchants import model
from kassa.merchants.directory import Directory
from kassa.merchants.records import API_KEY, CHANNEL_ACCOUNT, MERCHANT, ApiKey, ChannelAccount, Merchant
from kassa.merchants.store import MerchantStore
from kassa.merchants.vault import Vault


class NewKey(NamedTuple):
    """A key that was just made. `key` is shown once; nobody can find it out again."""

    id: Id
    key: str
    row: ApiKey


class Merchants:
    """Composes: read what is needed, let the model decide, commit, tell the directory."""

    def __init__(
        self,
        journal: Journal,
        store: MerchantStore,
        directory: Directory,
        vault: Vault,
        currencies: Callable[[int], Awaitable[Sequence[str]]],
    ) -> None:
        """currencies: those in which a home has a balance, read from the ledger."""
        self._journal = journal
        self._store = store
        self._directory = directory
        self._vault = vault
        self._currencies = currencies

    async def create(self, name: str, **policies: Any) -> Merchant:
        """A new merchant in a home of its own. Raises RequestInvalid for policies that do not exist."""
        checked = model.read_policies({"name": name, **policies})
        change = model.create(await self._store.next_home(), new_id(), checked.pop("name"), checked, datetime.now(UTC))
        return cast(Merchant, _result(await self._journal.commit(change)))

    async def get(self, merchant_id: Id) -> Merchant:
        """Raises MerchantNotFound."""
        merchant = await self._store.merchant(merchant_id)
        if merchant is None:
            raise MerchantNotFound(merchant=f"mch_{merchant_id}")
        return merchant

    async def all(self, after: Id | None = None, limit: int = 100) -> list[Merchant]:
        """A page of all merchants, oldest first."""
        return await self._store.merchants(after, limit)

    async def set_policies(self, merchant_id: Id, policies: Mapping[str, Any]) -> Merchant:
        """Raises RequestInvalid, MerchantNotFound. Payments that exist keep the policies they were made with."""
        checked = model.read_policies(policies)
        merchant = await self.get(merchant_id)
        currencies = await self._currencies(merchant.home)

        def decide(aggregate: Aggregate, now: datetime) -> Change:
            return model.set_policies(aggregate, checked, currencies)

        result = _result(await self._commit(merchant, Rule(MERCHANT, merchant_id, decide)))
        await self._changed(merchant.home)
        return cast(Merchant, result)

    async def create_key(self, merchant_id: Id, *, label: str = "", scopes: str = "all") -> NewKey:
        """An API key, shown here and never again. Raises RequestInvalid for unknown scopes, MerchantNotFound."""
        model.read_merchant_scopes(scopes)
        merchant = await self.get(merchant_id)
        return await self._create_key(merchant.home, merchant_id, label, scopes)

    async def create_operator_key(self, *, label: str = "") -> NewKey:
        """A key of the house, shown here and never again: it operates the queues, and can do nothing else."""
        # Whoever comes second finds the house there; then nothing happens.
        await self._journal.commit(model.create_house(datetime.now(UTC)))
        return await self._create_key(SYSTEM_HOME, model.HOUSE, label, "operator")

    async def operator_keys(self) -> list[ApiKey]:
        """The keys of the house, oldest first."""
        return await self._store.keys(SYSTEM_HOME)

    async def keys(self, merchant_id: Id) -> list[ApiKey]:
        """A merchant's keys, oldest first. Raises MerchantNotFound."""
        return await self._store.keys((await self.get(merchant_id)).home)

    async def revoke_key(self, key_id: Id) -> ApiKey:
        """From now on this process refuses the key, the others at the latest 2 seconds later. Raises ApiKeyNotFound."""
        row = await self._store.key(key_id)
        if row is None:
            raise ApiKeyNotFound(key=f"key_{key_id}")

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.revoke_key(aggregate, key_id, now)

        change = Change(home=row.home, rule=Rule(MERCHANT, row.root, decide, children=(API_KEY,), ids=(key_id,)))
        revoked = cast(ApiKey, _result(await self._journal.commit(change)))
        self._directory.forget_key(row.key_hash)
        await self._changed(row.home)
        return revoked

    async def set_channel(self, merchant_id: Id, channel: str, credentials: Mapping[str, Any]) -> ChannelAccount:
        """Keeps a merchant's credentials at a channel, encrypted. Raises MerchantNotFound.

        The caller has checked them against what the channel needs.
        """
        merchant = await self.get(merchant_id)
        sealed = self._vault.seal(merchant.home, channel, msgspec.json.encode(credentials))
        account_id = new_id()

        def decide(aggregate: Aggregate, now: datetime) -> Change:
            return model.set_channel(aggregate, account_id, channel, sealed, now)

        rule = Rule(MERCHANT, merchant_id, decide, children=(CHANNEL_ACCOUNT,))
        account = cast(ChannelAccount, _result(await self._commit(merchant, rule)))
        await self._changed(merchant.home)
        return account

    async def channels(self, merchant_id: Id) -> list[ChannelAccount]:
        """A merchant's accounts at all channels, credentials sealed. Raises MerchantNotFound."""
        return await self._store.channel_accounts((await self.get(merchant_id)).home)

    async def _create_key(self, home: int, owner: Id, label: str, scopes: str) -> NewKey:
        key, key_id = model.new_key(), new_id()

        def decide(aggregate: Aggregate, now: datetime) -> Change:
            return model.add_key(aggregate, key_id, key, label, scopes, now)

        verdict = await self._journal.commit(Change(home=home, rule=Rule(MERCHANT, owner, decide)))
        await self._changed(home)
        return NewKey(key_id, key, cast(ApiKey, _result(verdict)))

    async def _commit(self, merchant: Merchant, rule: Rule) -> Verdict:
        return await self._journal.commit(Change(home=merchant.home, rule=rule))

    async def _changed(self, home: int) -> None:
        self._directory.forget_home(home)
        await self._store.announce(home)


def _result(verdict: Verdict) -> Any:
    match verdict:
        case Committed(result):
            return result
        case Refused(error):
            raise error
        case Missing(_, id):
            raise MerchantNotFound(merchant=f"mch_{id}")
        case _:
            raise InvariantBroken("The journal answered what cannot be here.", verdict=type(verdict).__name__)
