"""What must hold after every commit, whatever happened, said independently of the rules that should bring it about.

Nothing here calls the rules that it checks. It keeps a second set of books from the entries, a second memory of every
row's state from the moves, and asks the provider's own books what is true. Each check names its invariant by number.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from kassa.channels.model import Request
from kassa.ids import Id
from kassa.journal.memory import MemoryJournal, StoredEvent
from kassa.journal.table import Record, Table
from kassa.ledger.chart import Code
from kassa.ledger.model import Account, HoldKey, Kind
from kassa.payments.records import ATTEMPT, PAYMENT, REFUND, Attempt, Payment, Refund
from kassa.simulation.channel import ChargeBody, RefundBody
from kassa.simulation.provider import Provider

LEGAL: Mapping[int, Mapping[str, frozenset[str]]] = {
    PAYMENT.number: {
        "processing": frozenset({"processing", "succeeded", "closing", "closed"}),
        "closing": frozenset({"closing", "succeeded", "closed"}),
        "succeeded": frozenset({"succeeded"}),
        "closed": frozenset({"late_succeeded"}),
        "late_succeeded": frozenset({"succeeded", "late_refunding", "held"}),
        "late_refunding": frozenset({"late_refunded", "held"}),
        "late_refunded": frozenset({"held"}),
        "held": frozenset({"succeeded", "late_refunding"}),
    },
    ATTEMPT.number: {
        "new": frozenset({"sending", "closed", "succeeded", "duplicate_paid"}),
        "sending": frozenset(
            {"sending", "new", "pending_payer", "unknown", "succeeded", "duplicate_paid", "failed", "closed"}
        ),
        "unknown": frozenset(
            {"unknown", "sending", "pending_payer", "succeeded", "duplicate_paid", "failed", "closed"}
        ),
        "pending_payer": frozenset({"pending_payer", "succeeded", "duplicate_paid", "failed", "closed"}),
        "failed": frozenset({"succeeded", "duplicate_paid"}),
        "closed": frozenset({"succeeded", "duplicate_paid"}),
    },
    REFUND.number: {
        "reserved": frozenset({"sending", "cancelled", "processing", "succeeded", "abnormal"}),
        "sending": frozenset({"sending", "reserved", "processing", "unknown", "succeeded", "failed", "abnormal"}),
        "unknown": frozenset({"unknown", "sending", "processing", "succeeded", "failed", "abnormal"}),
        "processing": frozenset({"processing", "succeeded", "failed", "abnormal"}),
        "abnormal": frozenset({"abnormal", "succeeded", "failed"}),
        "succeeded": frozenset({"succeeded", "reversed"}),
        "failed": frozenset({"failed"}),
        "reversed": frozenset({"reversed"}),
    },
}
"""Invariant 6: which state may follow which. Every other move is wrong, also one that the rules' own table allows."""

TOLD = {
    PAYMENT.number: frozenset({"succeeded", "closed", "late_succeeded", "late_refunding", "late_refunded", "held"}),
    ATTEMPT.number: frozenset({"duplicate_paid", "failed"}),
    REFUND.number: frozenset({"succeeded", "failed", "abnormal", "reversed", "cancelled"}),
}
"""Invariant 9: whoever enters one of these is told of in the same commit."""

PAYMENT_GOES_ON = frozenset({"processing", "closing", "late_succeeded"})
ATTEMPT_GOES_ON = frozenset({"new", "sending", "unknown", "pending_payer"})
REFUND_GOES_ON = frozenset({"reserved", "sending", "unknown", "processing", "abnormal"})
REFUND_IS_OUT = frozenset({"succeeded"})
PAID = frozenset({"succeeded", "duplicate_paid"})
GUARDED = frozenset({Code.WALLET, Code.SUSPENSE, Code.MERCHANT_PAYABLE})
"""Accounts that may not go below zero (by more than the merchant's overdraft)."""


class Violation(NamedTuple):
    """One promise that was broken."""

    invariant: int
    text: str

    def __str__(self) -> str:
        return f"invariant {self.invariant}: {self.text}"


class Sums:
    """One account's second set of books."""

    __slots__ = ("credits", "credits_pending", "debits", "debits_pending", "version")

    def __init__(self) -> None:
        self.debits = self.credits = self.debits_pending = self.credits_pending = self.version = 0


class Checker:
    """Looks at what each commit wrote, and remembers what it saw."""

    def __init__(
        self, journal: MemoryJournal, providers: Mapping[str, Provider], overdrafts: Mapping[int, int]
    ) -> None:
        """providers: by address, filled later. overdrafts: by home."""
        self.found: list[Violation] = []
        self.attempts_asked: Counter[Id] = Counter()
        """By payment: how many attempts merchants have asked for, each under a key of its own."""
        self._journal = journal
        self._providers = providers
        self._overdrafts = overdrafts
        self._on_the_way: Mapping[int, Request] = {}
        self._rows = self._entries = self._moves = self._events = 0
        self._accounts: dict[int, Account] = {}
        self._books: dict[int, Sums] = {}
        self._by_root: dict[Id, dict[tuple[int, str], list[int]]] = defaultdict(dict)
        """Root, then (code, owner): posted credits less debits, and pending debits."""
        self._states: dict[Id, tuple[int, str]] = {}
        """Each row's version and state, from its moves."""
        self._sequences: dict[Id, int] = {}
        self._sent: dict[str, bytes] = {}
        self._names: dict[tuple[int, str, str], Id] = {}

    def watch(self, on_the_way: Mapping[int, Request]) -> None:
        """Requests that were thought lost and will still arrive."""
        self._on_the_way = on_the_way

    def broken(self, invariant: int, text: str) -> None:
        """A promise was broken."""
        self.found.append(Violation(invariant, text))

    # Before something is sent

    def about_to_send(self, provider: Provider, request: Request) -> None:
        """The intent is stored and the money is held before the first byte leaves; the bytes never change."""
        if request.path == "/charges":
            charge = msgspec.json.decode(request.body, type=ChargeBody)
            row = self._journal.rows.get((ATTEMPT, Id(charge.number)))
            if not isinstance(row, Attempt) or row.state == "new":
                self.broken(7, f"charge {charge.number} was sent without a stored intent: {_state(row)}")
            self._same_bytes(charge.number, request.body)
        elif request.path == "/refunds":
            refund = msgspec.json.decode(request.body, type=RefundBody)
            row = self._journal.rows.get((REFUND, Id(refund.number)))
            if not isinstance(row, Refund) or row.state in ("failed", "cancelled"):
                self.broken(7, f"refund {refund.number} was sent without a stored intent: {_state(row)}")
            elif row.state in REFUND_GOES_ON and self._held(row) != refund.amount:
                self.broken(
                    4, f"refund {refund.number} of {refund.amount} was sent while {self._held(row)} is held for it"
                )
            self._same_bytes(refund.number, request.body)

    def _held(self, refund: Refund) -> int:
        holds = (self._journal.holds.get(HoldKey(refund.id, part)) for part in (0, 1))
        return sum(hold.amount for hold in holds if hold is not None and hold.state == "open")

    def _same_bytes(self, number: str, body: bytes) -> None:
        if self._sent.setdefault(number, body) != body:
            self.broken(5, f"{number} was sent again with other bytes")

    # After each commit

    def after_commit(self) -> None:
        """Everything that the last batch touched."""
        roots: dict[Id, None] = {}
        born = [record for _, record in islice(self._journal.rows.items(), self._rows, None)]
        self._rows += len(born)
        moves, entries, events = self._new_lines()
        for record in born:
            roots[record.root_id] = None
        told: dict[int, list[StoredEvent]] = defaultdict(list)
        for event in events:
            roots[event.root] = None
            told[event.seq].append(event)
            self._check_event(event)
        entered: set[int] = set()
        for entry in entries:
            entered.add(entry[8])
            if entry[10] is not None:
                roots[entry[10]] = None
            self._check_entry(entry)
        for record in born:
            self._check_born(record)
        for move in moves:
            roots[move[1]] = None
            self._check_move(move, told[move[5]])
        self._check_accounts()
        for root in roots:
            payment = self._journal.rows.get((PAYMENT, root))
            if isinstance(payment, Payment):
                self.check_payment(payment)

    def _new_lines(self) -> tuple[list[Any], list[Any], list[StoredEvent]]:
        journal = self._journal
        moves, entries, events = (
            journal.moves[self._moves :], journal.entries[self._entries :], journal.events[self._events :]
        )  # fmt: skip
        self._moves, self._entries, self._events = len(journal.moves), len(journal.entries), len(journal.events)
        return moves, entries, events

    def _check_event(self, event: StoredEvent) -> None:
        expected = self._sequences.get(event.root, 0) + 1
        if event.sequence != expected:
            self.broken(9, f"{event.type} of {event.root} has sequence {event.sequence}, not {expected}")
        self._sequences[event.root] = event.sequence

    def _check_entry(self, entry: Any) -> None:
        (debit, debit_version, debit_balance, credit, credit_version, credit_balance, amount, held, _, _, root, *_,
         kind, _) = entry  # fmt: skip
        if type(amount) is not int or type(held) is not int or (amount < 1 and kind != Kind.RELEASE):
            self.broken(10, f"an entry of {root} has the amount {amount!r}, held {held!r}")
            return
        posted = 0 if kind == Kind.HOLD else amount
        pending = {Kind.SINGLE: 0, Kind.HOLD: held, Kind.SETTLE: -held, Kind.RELEASE: -held}[Kind(kind)]
        left, right = self._sums(debit), self._sums(credit)
        left.debits += posted
        left.debits_pending += pending
        right.credits += posted
        right.credits_pending += pending
        for sums, version, balance in ((left, debit_version, debit_balance), (right, credit_version, credit_balance)):
            sums.version += 1
            if (sums.version, sums.credits - sums.debits) != (version, balance):
                self.broken(11, f"a statement has a gap: entry of {root} says {balance} at version {version}")
        from_key, to_key = self._accounts[debit].key, self._accounts[credit].key
        if from_key.currency != to_key.currency or from_key.home != to_key.home:
            self.broken(1, f"an entry of {root} goes from {from_key} to {to_key}")
        if root is not None:
            books = self._by_root[root]
            for key, change, reserved in ((from_key, -posted, pending), (to_key, posted, 0)):
                sums_of_root = books.setdefault((key.code, key.owner), [0, 0])
                sums_of_root[0] += change
                sums_of_root[1] += reserved

    def _sums(self, account_id: int) -> Sums:
        if account_id not in self._books:
            self._books[account_id] = Sums()
            for account in self._journal.accounts.values():
                self._accounts[account.id] = account
        return self._books[account_id]

    def _check_accounts(self) -> None:
        debits = credits = held_debits = held_credits = 0
        for account in self._journal.accounts.values():
            debits += account.debits_posted
            credits += account.credits_posted
            held_debits += account.debits_pending
            held_credits += account.credits_pending
            sums = self._books.get(account.id)
            if sums is not None and (
                sums.debits, sums.credits, sums.debits_pending, sums.credits_pending
            ) != (account.debits_posted, account.credits_posted, account.debits_pending, account.credits_pending):  # fmt: skip
                self.broken(11, f"{account.key} is not the sum of its entries")
            if account.key.code in GUARDED:
                floor = -self._overdrafts[account.key.home] if account.key.code == Code.MERCHANT_PAYABLE else 0
                if account.available < floor:
                    self.broken(4, f"{account.key} has {account.available} available")
        if debits != credits or held_debits != held_credits:
            self.broken(1, f"debits {debits}, credits {credits}, held {held_debits} and {held_credits}")

    def _check_born(self, record: Record) -> None:
        if isinstance(record, Payment | Attempt | Refund):
            self._states.setdefault(record.id, (0, "" if record.version else record.state))
        if isinstance(record, Payment):
            self._check_name(record.home, record.kind, record.order_id, record.id)
            self._check_provider_free(record.channel)
        elif isinstance(record, Refund):
            self._check_name(record.home, "refund", record.refund_id, record.id)
        elif isinstance(record, Attempt):
            self._check_other_attempts(record)

    def _check_provider_free(self, channel: str) -> None:
        for provider in self._providers.values():
            if provider.name == channel and provider.over_refunds:
                self.broken(3, f"{channel} was asked for more than was paid: {provider.over_refunds}")

    def _check_name(self, home: int, kind: str, name: str, id: Id) -> None:
        if self._names.setdefault((home, kind, name), id) != id:
            self.broken(2, f"{kind} {name} exists twice: {self._names[home, kind, name]} and {id}")

    def _check_other_attempts(self, attempt: Attempt) -> None:
        others = [other for other in self._attempts(attempt.root) if other.id != attempt.id]
        if attempt.version == 0 and any(other.state in ("sending", "unknown") for other in others):
            self.broken(5, f"payment {attempt.root} got attempt {attempt.id} while another is in doubt")
        if others and len(others) > self.attempts_asked[attempt.root]:
            self.broken(2, f"payment {attempt.root} has {len(others) + 1} attempts")

    def _check_move(self, move: Any, told: list[StoredEvent]) -> None:
        _, root, id, version, _, seq, _, _, table, event, before, after, *_ = move
        seen_version, seen_state = self._states.get(id, (0, ""))
        if version != seen_version + 1 or (seen_state and seen_state != before):
            self.broken(6, f"{id} moves from {before} at {version}, but it was {seen_state} at {seen_version}")
        self._states[id] = (version, after)
        legal = LEGAL.get(table)
        if legal is None:
            return
        if after not in legal.get(before, ()):
            self.broken(6, f"{id} went from {before} to {after} by {event}")
        if after == before:
            return
        if after in TOLD[table]:
            self._check_told(table, root, id, seq, after, told)
        if table == ATTEMPT.number:
            self._check_attempt(self._journal.rows[ATTEMPT, id], after)
        elif table == REFUND.number:
            self._check_refund(self._journal.rows[REFUND, id], after)

    def _check_told(self, table: int, root: Id, id: Id, seq: int, state: str, told: list[StoredEvent]) -> None:
        wanted = {ATTEMPT.number: {"failed": "attempt_failed"}}.get(table, {}).get(state, state)
        of_root = [event for event in told if event.root == root and event.type.endswith(f".{wanted}")]
        if table == ATTEMPT.number and state == "failed":
            payment = self._journal.rows[PAYMENT, root]
            if isinstance(payment, Payment) and payment.state not in ("processing", "closing"):
                return
        row = self._journal.rows[REFUND, id] if table == REFUND.number else None
        is_held = isinstance(row, Refund) and row.cause == "duplicate" and state in ("failed", "reversed")
        if is_held and not any(event.root == root and event.type.endswith(".duplicate_held") for event in told):
            self.broken(12, f"the second money of {root} cannot go back, and nobody is told")
        if table == REFUND.number:
            of_root = [event for event in of_root if event.type.startswith("refund.") and _names(event, id, state)]
        elif table == PAYMENT.number:
            of_root = [event for event in of_root if not event.type.startswith("refund.")]
        if not of_root:
            self.broken(9, f"{id} became {state} in change {seq}, and nobody was told")

    # What the provider's books say

    def _check_attempt(self, row: Record, after: str) -> None:
        if not isinstance(row, Attempt):
            return
        provider = self._provider(row.home, row.channel)
        order = provider.orders.get(row.id)
        if after in PAID:
            payment = self._journal.rows[PAYMENT, row.root]
            if order is None or order.state != "succeeded":
                self.broken(8, f"attempt {row.id} became {after}, but the provider has no such money")
            elif isinstance(payment, Payment) and order.body.amount != payment.amount:
                self.broken(8, f"attempt {row.id}: {order.body.amount} was paid for {payment.amount}")
        elif after in ("failed", "closed"):
            if not provider.is_settled_no(row.id):
                self.broken(5, f"attempt {row.id} became {after}, but the provider says {order and order.state}")
            elif order is None and self._can_still_begin(row.id):
                self.broken(5, f"attempt {row.id} became {after} while its request is still on its way")

    def _can_still_begin(self, number: str) -> bool:
        """Whether a request that was thought lost can still make the provider take this number in."""
        now = self._journal.clock.now()
        for request in self._on_the_way.values():
            if request.path == "/charges":
                charge = msgspec.json.decode(request.body, type=ChargeBody)
                if charge.number == number and now < charge.expires_at:
                    return True
            elif request.path == "/refunds" and msgspec.json.decode(request.body, type=RefundBody).number == number:
                return True
        return False

    def _check_refund(self, row: Record, after: str) -> None:
        if not isinstance(row, Refund):
            return
        if row.attempt is None:
            return
        attempt = self._journal.rows[ATTEMPT, row.attempt]
        provider = self._provider(row.home, attempt.channel if isinstance(attempt, Attempt) else "")
        back = provider.returns.get(row.id)
        states = back.states if back is not None else []
        match after:
            case "succeeded" if "succeeded" not in states:
                self.broken(8, f"refund {row.id} became succeeded, but the provider's states are {states}")
            case "failed" if "closed" not in states and (back is not None or row.id not in provider.refused):
                self.broken(5, f"refund {row.id} became failed, but the provider's states are {states}")
            case "failed" if back is None and self._can_still_begin(row.id):
                self.broken(5, f"refund {row.id} became failed while its request is still on its way")
            case "reversed" if back is None or back.state not in ("closed", "abnormal"):
                self.broken(8, f"refund {row.id} became reversed, but the provider's states are {states}")
            case "cancelled" if back is not None or self._can_still_begin(row.id):
                self.broken(5, f"refund {row.id} became cancelled, but the provider has it, or will")
            case _:
                pass

    def _provider(self, home: int, channel: str) -> Provider:
        return next(one for one in self._providers.values() if (one.home, one.name) == (home, channel))

    # One payment with all that belongs to it

    def check_payment(self, payment: Payment) -> None:
        """Bounds, counters, timers, and the ledger against what the rows say."""
        attempts, refunds = self._attempts(payment.id), self._refunds(payment.id)
        self._check_bounds(payment, refunds)
        self._check_timers(payment, attempts, refunds)
        self._check_books(payment, attempts, refunds)
        if payment.sequence != self._sequences.get(payment.id, 0):
            self.broken(9, f"payment {payment.id} has sequence {payment.sequence}, not as many events")
        given_back = {refund.attempt for refund in refunds if refund.cause == "duplicate"}
        if any(attempt.state == "duplicate_paid" and attempt.id not in given_back for attempt in attempts):
            self.broken(2, f"payment {payment.id} was paid twice, and nobody gives the second money back")
        if payment.state == "late_refunding" and not any(refund.cause == "late" for refund in refunds):
            self.broken(2, f"payment {payment.id} is to be given back, and nobody does")
        if payment.state == "closed" and any(attempt.state in ATTEMPT_GOES_ON for attempt in attempts):
            self.broken(6, f"payment {payment.id} is closed while attempts are open")

    def _check_bounds(self, payment: Payment, refunds: list[Refund]) -> None:
        asked = [refund for refund in refunds if refund.cause == "asked"]
        done = sum(refund.amount for refund in asked if refund.state in REFUND_IS_OUT)
        reserved = sum(refund.amount for refund in asked if refund.state in REFUND_GOES_ON)
        if done + reserved > payment.amount:
            self.broken(3, f"payment {payment.id} of {payment.amount} gives back {done} and reserves {reserved}")
        if (payment.amount_refunded, payment.amount_refunding) != (done, reserved):
            self.broken(
                3,
                f"payment {payment.id} counts {payment.amount_refunded} and {payment.amount_refunding}, not {done} and {reserved}",
            )
        for cause in ("late", "duplicate"):
            by_attempt = Counter(
                refund.attempt
                for refund in refunds
                if refund.cause == cause and refund.state in REFUND_GOES_ON | REFUND_IS_OUT
            )
            if any(number > 1 for number in by_attempt.values()):
                self.broken(3, f"payment {payment.id} gives {cause} money back twice")
        if done == payment.amount and payment.kind == "payment":
            kept = 0 if payment.fee_on_refund == "returned" else _fee(payment)
            given_back = sum(refund.fee_returned for refund in asked if refund.state in REFUND_IS_OUT)
            if _fee(payment) - given_back != kept:
                self.broken(
                    10, f"payment {payment.id} is given back in full, but {given_back} of its fee {_fee(payment)}"
                )
        if any(type(refund.amount) is not int or refund.amount < 1 for refund in refunds):
            self.broken(10, f"payment {payment.id} has a refund of no amount")

    def _check_timers(self, payment: Payment, attempts: list[Attempt], refunds: list[Refund]) -> None:
        timers = self._journal.timers
        open_: list[tuple[Id, str]] = []
        if payment.state in PAYMENT_GOES_ON:
            open_.append((payment.id, "payment_late" if payment.state == "late_succeeded" else "payment_expire"))
        open_ += [(attempt.id, "attempt") for attempt in attempts if attempt.state in ATTEMPT_GOES_ON]
        open_ += [(refund.id, "refund") for refund in refunds if refund.state in REFUND_GOES_ON]
        for key in open_:
            if key not in timers:
                self.broken(12, f"nobody will ever look at {key[1]} {key[0]} of payment {payment.id} again")

    def _check_books(self, payment: Payment, attempts: list[Attempt], refunds: list[Refund]) -> None:
        expected = _expected(payment, attempts, refunds)
        actual = {key: (posted, held) for key, (posted, held) in self._by_root[payment.id].items() if posted or held}
        if actual != expected:
            self.broken(
                2,
                f"payment {payment.id} ({payment.state}) has booked {_shown(actual)}, but it should be {_shown(expected)}",
            )

    def _attempts(self, root: Id) -> list[Attempt]:
        return [row for row in self._journal.children(ATTEMPT, root) if isinstance(row, Attempt)]

    def _refunds(self, root: Id) -> list[Refund]:
        return [row for row in self._journal.children(REFUND, root) if isinstance(row, Refund)]

    # At the end, when all is quiet

    def at_the_end(self) -> list[str]:
        """The provider's books are the ledger's, everything is final or shown. Returns what a person is shown."""
        shown: list[str] = []
        for provider in self._providers.values():
            for number, order in provider.orders.items():
                attempt = self._journal.rows.get((ATTEMPT, Id(number)))
                if (order.state == "succeeded") != (attempt is not None and _state(attempt) in PAID):
                    self.broken(2, f"attempt {number} is {_state(attempt)}, at the provider {order.state}")
            for number, back in provider.returns.items():
                refund = self._journal.rows.get((REFUND, Id(number)))
                if (back.state == "succeeded") != (_state(refund) == "succeeded"):
                    self.broken(2, f"refund {number} is {_state(refund)}, at the provider {back.states}")
            if provider.over_refunds:
                self.broken(3, f"{provider.name} was asked for more than was paid: {provider.over_refunds}")
        for home in {provider.home: None for provider in self._providers.values()}:
            held = sum(provider.balance for provider in self._providers.values() if provider.home == home)
            owed = -sum(
                account.balance
                for key, account in self._journal.accounts.items()
                if key.home == home and key.code == Code.CHANNEL_RECEIVABLE
            )
            if held != owed:
                self.broken(1, f"the providers hold {held} for home {home}, the ledger says {owed}")
        for table, final in _FINAL.items():
            for row in self._journal.all_of(table):
                state = _state(row)
                if state in _SHOWN or self._waits_for_person(row):
                    shown.append(f"{table.name} {row.id} {state}")
                elif state not in final:
                    self.broken(12, f"{table.name} {row.id} is still {state} when all is quiet")
        self._check_replay()
        return shown

    def _waits_for_person(self, row: Record) -> bool:
        """Money that must go back cannot: the provider cannot credit the payer, or refuses."""
        if isinstance(row, Payment):
            is_abnormal = any(refund.state == "abnormal" for refund in self._refunds(row.id))
            return row.state == "late_refunding" and is_abnormal
        return isinstance(row, Refund) and row.state in ("failed", "reversed") and row.doubt_since is not None

    def _check_replay(self) -> None:
        """Every row is where its moves lead."""
        last: dict[Id, Any] = {move[2]: move for move in self._journal.moves}  # type: ignore[misc]
        for (table, id), row in self._journal.rows.items():
            move = last.get(id)
            if move is not None and msgspec.json.encode(table.mutable_values(row)).decode() != move[13]:
                self.broken(11, f"{table.name} {id} is not where its moves lead")


_FINAL: Mapping[Table, frozenset[str]] = {
    PAYMENT: frozenset({"succeeded", "closed", "late_refunded"}),
    ATTEMPT: frozenset({"succeeded", "failed", "closed", "duplicate_paid"}),
    REFUND: frozenset({"succeeded", "failed", "reversed", "cancelled"}),
}
_SHOWN = frozenset({"held", "abnormal"})
"""A person must act; these stand on the list of what is stuck."""

Books = dict[tuple[int, str], tuple[int, int]]


def _expected(payment: Payment, attempts: list[Attempt], refunds: list[Refund]) -> Books:
    """What the rows of a payment say that the ledger must hold for it: (posted, reserved) by account."""
    posted: Counter[tuple[int, str]] = Counter()
    reserved: Counter[tuple[int, str]] = Counter()
    outside = (int(Code.CHANNEL_RECEIVABLE), "")
    wallet = (int(Code.WALLET), str(payment.wallet))
    payable, income, suspense = (int(Code.MERCHANT_PAYABLE), ""), (int(Code.FEE_INCOME), ""), (int(Code.SUSPENSE), "")
    source = wallet if payment.channel == "wallet" else outside
    fee = _fee(payment)
    if payment.state == "succeeded":
        posted[source] -= payment.amount
        if payment.kind == "topup":
            posted[wallet] += payment.amount
        else:
            posted[payable] += payment.amount - fee
            posted[income] += fee
    elif payment.paid_attempt is not None:
        posted[outside] -= payment.amount
        posted[suspense] += payment.amount
    for attempt in attempts:
        if attempt.state == "duplicate_paid":
            posted[outside] -= payment.amount
            if not _is_accepted(attempt, refunds):
                posted[suspense] += payment.amount
            elif payment.kind == "topup":
                posted[wallet] += payment.amount
            else:
                posted[payable] += payment.amount - fee
                posted[income] += fee
    for refund in refunds:
        if refund.cause != "asked":
            parts = [(suspense, refund.amount)]
        elif payment.kind == "topup":
            parts = [(wallet, refund.amount)]
        else:
            parts = [(payable, refund.amount - refund.fee_returned), (income, refund.fee_returned)]
        for account, amount in parts:
            if refund.state in REFUND_IS_OUT:
                posted[account] -= amount
                posted[source] += amount
            elif refund.state in REFUND_GOES_ON:
                reserved[account] += amount
    keys = {**posted, **reserved}
    return {key: (posted[key], reserved[key]) for key in keys if posted[key] or reserved[key]}


def _is_accepted(attempt: Attempt, refunds: list[Refund]) -> bool:
    """Whether a person gave second money, that could not be given back, to the merchant: nothing waits for anybody."""
    own = [refund for refund in refunds if refund.cause == "duplicate" and refund.attempt == attempt.id]
    return all(refund.state in ("failed", "reversed") and refund.doubt_since is None for refund in own)


def _fee(payment: Payment) -> int:
    return half_up(Fraction(payment.amount * payment.fee_ppm, 1_000_000))


def half_up(exact: Fraction) -> int:
    """Rounded to the nearest whole unit, a half upwards."""
    return (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)


def _names(event: StoredEvent, id: Id, state: str) -> bool:
    data: dict[str, str] = msgspec.json.decode(event.data)
    return (data["id"], data["state"]) == (f"rfd_{id}", state)


def _state(row: Record | None) -> str:
    return getattr(row, "state", "missing")


def _shown(books: Books) -> str:
    names: Callable[[int], str] = lambda code: Code(code).name.lower()  # noqa: E731
    return ", ".join(
        f"{names(code)} {posted}" + (f" ({held} held)" if held else "")
        for (code, _), (posted, held) in sorted(books.items())
    )
