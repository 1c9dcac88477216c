"""`Prefer`: how long the caller wants to wait for a final answer (RFC 7240). Pure."""

import re
from typing import NamedTuple

WAIT_MAX_S = 30
"""Longer waits are cut to this: proxies give up after a minute."""

_WAIT = re.compile(r'^wait\s*=\s*"?(\d{1,6})"?$')


class Preference(NamedTuple):
    """What was asked for and understood. Neither: the first answer, as soon as there is one."""

    wait_s: int | None = None
    is_async: bool = False

    @property
    def applied(self) -> str | None:
        """`Preference-Applied`; None when nothing was asked for."""
        if self.is_async:
            return "respond-async"
        return None if self.wait_s is None else f"wait={self.wait_s}"


NONE = Preference()


def read_prefer(header: str | None) -> Preference:
    """The preferences of a Prefer header. What is not understood is ignored, as the RFC has it; the first one wins."""
    if not header:
        return NONE
    wait_s: int | None = None
    is_async = False
    for part in header.split(","):
        token = part.split(";", 1)[0].strip().lower()
        wait = _WAIT.match(token)
        if token == "respond-async":
            is_async = True
        elif wait is not None and wait_s is None:
            wait_s = min(int(wait[1]), WAIT_MAX_S)
    if wait_s is not None and is_async:
        # Both together mean: wait so long, then answer 202 (RFC 7240, section 4.3). That is what wait does here anyway.
        return Preference(wait_s)
    return Preference(wait_s, is_async)
