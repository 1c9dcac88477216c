"""How much one merchant may ask of this process at a time, so that it cannot take every place from the others.

Two limits, checked once the API key is known: requests per second of one key, and requests of one merchant that are not
answered yet. What is past them is refused before anything is read: 429 `system.too_many`. Each process counts for itself.
"""

import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kassa.api.http import Response
from kassa.errors import TooMany
from kassa.ids import Id
from kassa.merchants.model import Caller

BURST_S = 2.0
"""A key that was quiet may ask as much at once as it may in that time."""
HELD_MAX = 20_000
"""Keys remembered at most; those that are quiet are forgotten first."""


class MerchantPlaces:
    """How many requests of one merchant are under way."""

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = 0

    def leave(self, _done: Any = None) -> None:
        """One was answered. Takes what a future tells its callbacks."""
        self.taken -= 1

    async def held(self, work: Coroutine[Any, Any, Response]) -> Response:
        """Does the work of a request that has a place, and gives the place back whatever becomes of it."""
        try:
            return await work
        finally:
            self.taken -= 1


class _Key:
    """One API key: when its bucket will be empty again, and its merchant's places."""

    __slots__ = ("empty_at", "places")

    def __init__(self, places: MerchantPlaces) -> None:
        self.empty_at = 0.0
        self.places = places


class Fairness:
    """Admits requests. Measured: half a microsecond for one that is answered by a future, its callback included."""

    def __init__(
        self,
        *,
        per_second: float,
        in_flight_max: int,
        burst_s: float = BURST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """per_second: requests of one key; in_flight_max: of one merchant at once. clock: seconds, never back."""
        self._interval_s = 1.0 / per_second
        # One request fits even where so few are allowed that the burst is shorter than the pause between two. The thousandth
        # is for sums of floats.
        self._burst_s = max(burst_s, self._interval_s) + self._interval_s / 1000
        self._in_flight_max = in_flight_max
        self._clock = clock
        self._keys: dict[Id, _Key] = {}
        self._merchants: dict[int, MerchantPlaces] = {}

    def admit(self, caller: Caller) -> MerchantPlaces:
        """Counts a request as begun, and says where it is to be counted as answered. Raises TooMany."""
        key = self._keys.get(caller.key_id) or self._key(caller)
        now = self._clock()
        empty_at = key.empty_at
        if empty_at < now:
            empty_at = now
        empty_at += self._interval_s
        if empty_at - now > self._burst_s:
            raise self._too_fast(empty_at - now - self._burst_s)
        places = key.places
        if places.taken >= self._in_flight_max:
            raise self._too_many_at_once()
        key.empty_at = empty_at
        places.taken += 1
        return places

    def _key(self, caller: Caller) -> _Key:
        if len(self._keys) >= HELD_MAX:
            self._forget_quiet()
        home = caller.merchant.home
        places = self._merchants.get(home)
        if places is None:
            places = self._merchants[home] = MerchantPlaces()
        key = self._keys[caller.key_id] = _Key(places)
        return key

    def _forget_quiet(self) -> None:
        """Drops every key whose bucket is empty, and every merchant without a key and without a request.

        Where none is quiet, all buckets begin anew: that lets some pass, and the places of merchants stay counted.
        """
        now = self._clock()
        self._keys = {name: key for name, key in self._keys.items() if key.empty_at > now}
        if len(self._keys) >= HELD_MAX:
            self._keys = {}
        used = {id(key.places) for key in self._keys.values()}
        self._merchants = {
            home: places for home, places in self._merchants.items() if places.taken or id(places) in used
        }

    def _too_fast(self, wait_s: float) -> TooMany:
        per_second = f"{1.0 / self._interval_s:g}"
        return TooMany(
            f"More than {per_second} requests a second with this API key.", retry_after_s=max(1, math.ceil(wait_s))
        )

    def _too_many_at_once(self) -> TooMany:
        return TooMany(f"{self._in_flight_max} requests of this merchant are under way.", retry_after_s=1)
