"""A provider in memory: its own books of charges and refunds, its own idea of time, and callbacks about what happens.

It knows nothing of Kassa. What it says is always true of its books; what is lost, late, twice or forged on the way is
the line's affair (`line.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from random import Random
from typing import Protocol

import msgspec

from kassa.channels.model import Request, Response
from kassa.simulation.channel import SIGNED, ChargeBody, RefundBody, Said


class Surroundings(Protocol):
    """What the provider needs of the world."""

    random: Random

    def now(self) -> datetime: ...
    def later(self, delay_s: float, act: Callable[[], None]) -> None: ...
    def notify(self, provider: "Provider", said: Said, *, surely: bool) -> None:
        """surely: no later question of ours would ever find this out, so the callback may be late but not lost."""
        ...


@dataclass(slots=True)
class Order:
    """A charge in the provider's books: waiting, succeeded, closed or failed."""

    body: ChargeBody
    state: str
    channel_id: str
    was_ended: bool = False
    """It was closed, failed or out of time once: saying "not paid" was right then."""


@dataclass(slots=True)
class Return:
    """A refund in the provider's books: processing, succeeded, closed or abnormal."""

    body: RefundBody
    state: str
    channel_id: str
    states: list[str] = field(default_factory=list)
    """All states that it has ever had."""

    @property
    def came_back(self) -> bool:
        """The payer has not got it and will not: it may be given back again."""
        return self.state == "closed" or (self.state == "abnormal" and "succeeded" in self.states)


class Provider:
    """One merchant's account at one channel."""

    def __init__(self, name: str, home: int, world: Surroundings) -> None:
        self.name = name
        self.home = home
        self.orders: dict[str, Order] = {}
        self.returns: dict[str, Return] = {}
        self.refused: set[str] = set()
        """Numbers that were refused at least once."""
        self.over_refunds: list[str] = []
        """Refund numbers that asked for more than was paid: nobody who keeps books would."""
        self.is_kind = False
        """True: from now on nothing goes wrong here any more."""
        self._world = world
        self._serial = 0

    @property
    def balance(self) -> int:
        """What the account holds: paid less given back."""
        paid = sum(order.body.amount for order in self.orders.values() if order.state == "succeeded")
        return paid - sum(back.body.amount for back in self.returns.values() if back.state == "succeeded")

    def handle(self, request: Request) -> Response:
        """Answers one request, at once and truly."""
        match request.path.strip("/").split("/"), request.method:
            case ["charges"], "POST":
                return self._charge(msgspec.json.decode(request.body, type=ChargeBody))
            case ["charges", number], "GET":
                return self._answer_order(number)
            case ["charges", number, "close"], "POST":
                return self._close(number)
            case ["refunds"], "POST":
                return self._refund(msgspec.json.decode(request.body, type=RefundBody))
            case ["refunds", number], "GET":
                return self._answer_return(number)
            case _:
                return Response(405, SIGNED, b"{}")

    # Charges

    def _charge(self, body: ChargeBody) -> Response:
        order = self.orders.get(body.number)
        if order is not None:
            if order.state == "succeeded":
                # Like the real ones: "paid already", without saying how much.
                return _said(Said("succeeded", body.number))
            return self._show_code(body.number)
        if self._world.now() >= body.expires_at or (not self.is_kind and self._world.random.random() < 0.06):
            self.refused.add(body.number)
            return _said(Said("refused", body.number), 400)
        self.orders[body.number] = Order(body, "waiting", self._next_id())
        self._let_payer_act(body.number)
        return self._show_code(body.number)

    def _show_code(self, number: str) -> Response:
        order = self.orders[number]
        code_url = f"pay://{number}" if order.state == "waiting" else None
        return _said(msgspec.structs.replace(_of_order(order), code_url=code_url))

    def _let_payer_act(self, number: str) -> None:
        random = self._world.random
        fate = random.random()
        if fate < 0.72:
            self._world.later(random.expovariate(1 / 60.0), lambda: self.pay(number))
        elif fate < 0.78:
            self._world.later(random.expovariate(1 / 60.0), lambda: self.fail(number))

    def pay(self, number: str) -> None:
        """The payer pays, if it is still possible; rarely the money comes although the order was closed before."""
        order = self.orders[number]
        late = not self._is_payable(order)
        if order.state == "succeeded" or (late and (self.is_kind or self._world.random.random() > 0.6)):
            return
        order.was_ended = order.was_ended or late
        order.state = "succeeded"
        self._tell_order(number, surely=order.was_ended or number in self.refused)

    def fail(self, number: str) -> None:
        """The payer's bank says no, for good."""
        order = self.orders[number]
        if self._is_payable(order):
            order.state, order.was_ended = "failed", True
            self._tell_order(number, surely=False)

    def is_settled_no(self, number: str) -> bool:
        """Whether "this was not paid and will not be" has been true of a charge, by what the provider knew then."""
        order = self.orders.get(number)
        if order is None:
            return True
        return order.was_ended or not (order.state == "succeeded" or self._is_payable(order))

    def _is_payable(self, order: Order) -> bool:
        return order.state == "waiting" and self._world.now() < order.body.expires_at

    def _close(self, number: str) -> Response:
        order = self.orders.get(number)
        if order is None:
            return Response(404, SIGNED, b"{}")
        if order.state == "waiting":
            order.state, order.was_ended = "closed", True
            random = self._world.random
            if not self.is_kind and random.random() < 0.3:
                # The payer's bank was quicker than the close, and says so later.
                self._world.later(random.expovariate(1 / 300.0), lambda: self.pay(number))
        if order.state == "succeeded":
            return _said(Said("succeeded", number))
        return self._answer_order(number)

    def _answer_order(self, number: str) -> Response:
        order = self.orders.get(number)
        if order is None:
            return Response(404, SIGNED, b"{}")
        return _said(_of_order(order))

    def _tell_order(self, number: str, *, surely: bool) -> None:
        order = self.orders[number]
        said = msgspec.structs.replace(
            _of_order(order), kind="charge", notice=self._next_id(), attach=order.body.attach
        )
        self._world.notify(self, said, surely=surely)

    # Refunds

    def _refund(self, body: RefundBody) -> Response:
        if body.number in self.returns:
            return self._answer_return(body.number)
        order = self.orders.get(body.charge_number)
        on_the_way = sum(
            back.body.amount
            for back in self.returns.values()
            if back.body.charge_number == body.charge_number and not back.came_back
        )
        if order is None or order.state != "succeeded" or on_the_way + body.amount > order.body.amount:
            self.over_refunds.append(body.number)
            return _said(Said("refused", body.number), 400)
        if not self.is_kind and self._world.random.random() < 0.05:
            self.refused.add(body.number)
            return _said(Said("refused", body.number), 400)
        self.returns[body.number] = Return(body, "processing", self._next_id(), ["processing"])
        self._world.later(self._world.random.expovariate(1 / 200.0), lambda: self.settle(body.number))
        return self._answer_return(body.number)

    def settle(self, number: str) -> None:
        """The refund gets on: mostly the payer has the money; else nobody can credit the payer, or it is closed."""
        random, back = self._world.random, self.returns[number]
        if back.state == "succeeded":
            # The payer's bank sends it back: it goes to the account, or waits for a person.
            self._become(number, random.choice(("closed", "abnormal")))
            return
        if back.state not in ("processing", "abnormal"):
            return
        fate = random.random()
        if self.is_kind or fate < 0.8 or (back.state == "abnormal" and fate < 0.95):
            self._become(number, "succeeded")
            if not self.is_kind and random.random() < 0.12:
                self._world.later(random.uniform(1, 3000), lambda: self.settle(number))
        elif fate < 0.9:
            self._become(number, "closed")
        elif back.state == "processing":
            self._become(number, "abnormal")
            if random.random() < 0.7:
                self._world.later(random.uniform(1, 2000), lambda: self.settle(number))

    def _become(self, number: str, state: str) -> None:
        back = self.returns[number]
        surely = back.state == "succeeded"
        back.state = state
        back.states.append(state)
        said = msgspec.structs.replace(_of_return(back), kind="refund", notice=self._next_id())
        self._world.notify(self, said, surely=surely)

    def _answer_return(self, number: str) -> Response:
        back = self.returns.get(number)
        if back is None:
            return Response(404, SIGNED, b"{}")
        return _said(_of_return(back))

    def _next_id(self) -> str:
        self._serial += 1
        return f"{self.name}-{self.home}-{self._serial}"


def _of_order(order: Order) -> Said:
    body = order.body
    paid = order.state == "succeeded"
    return Said(
        order.state,
        body.number,
        order.channel_id,
        body.amount if paid else None,
        body.currency if paid else None,
    )


def _of_return(back: Return) -> Said:
    return Said(back.state, back.body.number, back.channel_id, back.body.amount, back.body.currency)


def _said(said: Said, status: int = 200) -> Response:
    headers: Mapping[str, str] = SIGNED
    return Response(status, headers, msgspec.json.encode(said))
