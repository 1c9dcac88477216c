"""The line between Kassa and the providers, in both directions: what is lost, late, twice, out of order, garbled, forged."""

import asyncio
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from random import Random
from typing import Protocol, TypeVar

import msgspec

from kassa.channels.channel import Charges
from kassa.channels.model import Evidence, NotSent, Request, Response, Unknown
from kassa.channels.runner import Exchange
from kassa.errors import ChannelNotFound
from kassa.simulation.channel import SIGNED, ModelChannel, Said
from kassa.simulation.provider import Provider
from kassa.simulation.virtual import VirtualClock

Result = TypeVar("Result")

FAULTS = {
    "not_sent": 0.03,
    "lost_before": 0.05,
    "arrives_later": 0.03,
    "lost_after": 0.06,
    "error_before": 0.02,
    "error_after": 0.02,
    "too_many": 0.02,
    "garbled": 0.015,
    "unsigned": 0.015,
}
"""What becomes of one request, by chance."""

TIMEOUT_S = 8.0
LATER_S_MAX = 300.0
"""How long a request that was thought lost can be on its way; well within the rules' time of grace."""
CALLBACK_PAUSES_S = (0.1, 15.0, 15.0, 30.0, 180.0, 600.0, 1200.0, 1800.0)
"""Before each delivery of a callback that was not taken."""


class Watcher(Protocol):
    """Looks at what goes out, before it goes."""

    def about_to_send(self, provider: Provider, request: Request) -> None: ...


class Line:
    """All providers, and the way to them. It is Kassa's runner and Kassa's directory of channels."""

    def __init__(
        self,
        clock: VirtualClock,
        random: Random,
        watcher: Watcher,
        later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self.is_kind = False
        """True: from now on nothing goes wrong here any more."""
        self.providers: dict[str, Provider] = {}
        """By address."""
        self.faults: Counter[str] = Counter()
        self.on_the_way: dict[int, Request] = {}
        """Requests that were thought lost and will still arrive."""
        self._clock = clock
        self._random = random
        self._watcher = watcher
        self._later = later
        self._channels: dict[tuple[int, str], Charges] = {}
        self._sent_late = 0

    def connect(self, provider: Provider) -> None:
        """From now on the merchant of this home has this channel."""
        self.providers[address(provider.home, provider.name)] = provider
        self._channels[provider.home, provider.name] = ModelChannel()

    async def for_merchant(self, home: int, channel: str) -> tuple[Charges, str]:
        """The channel and its provider's address. Raises ChannelNotFound."""
        found = self._channels.get((home, channel))
        if found is None:
            raise ChannelNotFound(channel=channel)
        return found, address(home, channel)

    def learn(self, home: int, channel: str, fresh: Charges) -> None:
        """The channel has new keys."""
        self._channels[home, channel] = fresh

    async def run(
        self, steps: Generator[Request, Response, Result], base_url: str, trace: Callable[[Exchange], None]
    ) -> Result | Unknown | NotSent:
        """Drives a conversation, as the real runner does, over a bad line."""
        provider = self.providers[base_url]
        answer: Response | None = None
        while True:
            try:
                request = next(steps) if answer is None else steps.send(answer)
            except StopIteration as end:
                result: Result = end.value
                return result
            is_first = answer is None
            self._watcher.about_to_send(provider, request)
            said = await self._exchange(provider, request)
            trace(self._exchange_row(request, said))
            if not isinstance(said, Response):
                steps.close()
                evidence = Evidence("transport", authentic=False, text=said)
                return NotSent(evidence, said) if said == "not_sent" and is_first else Unknown(evidence, said)
            answer = said

    async def _exchange(self, provider: Provider, request: Request) -> Response | str:
        fault = self._draw()
        latency_s = self._random.choice((0.05, 0.1, 0.3, 2.0, 6.0))
        match fault:
            case "not_sent":
                await asyncio.sleep(0.01)
                return fault
            case "lost_before":
                await asyncio.sleep(TIMEOUT_S)
                return fault
            case "arrives_later":
                self._send_later(provider, request)
                await asyncio.sleep(TIMEOUT_S)
                return fault
            case "too_many" | "error_before":
                await asyncio.sleep(latency_s)
                return Response(429 if fault == "too_many" else 502, {}, b"")
            case _:
                await asyncio.sleep(latency_s)
                answer = provider.handle(request)
        match fault:
            case "lost_after":
                await asyncio.sleep(TIMEOUT_S)
                return fault
            case "error_after":
                return Response(500, {}, b"")
            case "garbled":
                return Response(answer.status, SIGNED, b'{"state":"?"}')
            case "unsigned":
                return Response(answer.status, {}, answer.body)
            case _:
                await asyncio.sleep(self._random.choice((0.01, 0.05, 1.0)))
                return answer

    def _draw(self) -> str:
        if self.is_kind:
            return "none"
        point = self._random.random()
        for fault, share in FAULTS.items():
            point -= share
            if point < 0:
                self.faults[fault] += 1
                return fault
        return "none"

    def _send_later(self, provider: Provider, request: Request) -> None:
        self._sent_late += 1
        place = self._sent_late
        self.on_the_way[place] = request

        def arrive() -> None:
            del self.on_the_way[place]
            provider.handle(request)

        self._later(self._random.uniform(TIMEOUT_S, LATER_S_MAX), arrive)

    def _exchange_row(self, request: Request, said: Response | str) -> Exchange:
        answer = said if isinstance(said, Response) else None
        return Exchange(
            method=request.method,
            path=request.path,
            status=answer.status if answer else None,
            started_at=self._clock.now(),
            duration_ms=0,
            error=None if answer else str(said),
            request_summary="",
            response_summary="",
        )


def address(home: int, channel: str) -> str:
    """Where the provider of a merchant's channel is."""
    return f"https://{channel}.example/{home}"


def lies(random: Random, said: Said) -> tuple[str, Mapping[str, str], bytes]:
    """A callback that must not be believed: (what is wrong with it, headers, body)."""
    paid = msgspec.structs.replace(said, state="succeeded", code_url=None, notice="lie", channel_id="lie-1")
    amount = said.amount or 100
    kinds = ("unsigned", "amount", "currency", "number", "owner") if said.kind == "charge" else (
        "unsigned", "amount", "currency", "number",
    )  # fmt: skip
    match random.choice(kinds):
        case "unsigned":
            return "unsigned", {}, msgspec.json.encode(paid)
        case "amount":
            wrong = max(1, amount + random.choice((-1, 1, -amount // 2, amount * 99)))
            wrong = wrong if wrong != amount else amount + 1
            return "amount", SIGNED, msgspec.json.encode(msgspec.structs.replace(paid, amount=wrong))
        case "currency":
            return "currency", SIGNED, msgspec.json.encode(msgspec.structs.replace(paid, currency="JPY"))
        case "number":
            return "number", SIGNED, msgspec.json.encode(msgspec.structs.replace(paid, number="f" * 32, attach=None))
        case _:
            return "owner", SIGNED, msgspec.json.encode(msgspec.structs.replace(paid, attach="e" * 32))
