"""What a journal knows of accounts without asking: how they will stand when all that was sent is committed.

It may be wrong, since others write too, and since what was sent may fail. So nothing is believed that rests on it: a batch
that was judged by it is written only if the database finds every account as it was known (docs/decisions/0006).
"""

from collections.abc import Iterable

from kassa.ledger.model import Account, AccountKey

ACCOUNTS_MAX = 100_000
"""Accounts kept in memory, about 50 MB; those that were learnt first go first, and cost one query when they are needed."""


class KnownAccounts:
    """Accounts by key; shared by the lanes of a journal. The judge changes them in place."""

    def __init__(self) -> None:
        self._accounts: dict[AccountKey, Account] = {}

    def id_of(self, key: AccountKey) -> int | None:
        """An account's id, which is true for ever."""
        account = self._accounts.get(key)
        return None if account is None else account.id

    def some(self, keys: Iterable[AccountKey]) -> tuple[dict[AccountKey, Account], list[AccountKey]]:
        """The accounts that are known of these, and the keys of the others."""
        accounts = self._accounts
        found, missing = {}, []
        for key in keys:
            account = accounts.get(key)
            if account is None:
                missing.append(key)
            else:
                found[key] = account
        return found, missing

    def learn(self, accounts: Iterable[Account]) -> None:
        """Accounts as they were read without locks. What is known already may be newer, so it stays."""
        for account in accounts:
            self._accounts.setdefault(account.key, account)
        self._bound()

    def settle(self, accounts: Iterable[Account]) -> None:
        """Accounts as a batch that locked them left them."""
        for account in accounts:
            self._accounts[account.key] = account
        self._bound()

    def doubt(self, accounts: Iterable[Account]) -> None:
        """What was judged by these was not written, so they may be otherwise."""
        for account in accounts:
            self._accounts.pop(account.key, None)

    def forget(self) -> None:
        """Nothing is known any more."""
        self._accounts.clear()

    def _bound(self) -> None:
        while len(self._accounts) > ACCOUNTS_MAX:
            del self._accounts[next(iter(self._accounts))]
