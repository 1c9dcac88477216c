"""Sends one webhook: only to public addresses, without following redirects, reading a bounded answer in bounded time.

The address is checked where the socket is made, so what was checked is what is connected to, whatever a name server
says the next time (DNS rebinding). Host and SNI stay those of the URL.
"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Sequence
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from kassa.errors import RequestInvalid
from kassa.notifications.model import Answer, Secret, signature

TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 4096
"""Nobody looks at the body; reading a little of it lets the receiver finish his sentence."""
URL_CHARACTERS_MAX = 2048

_UNIVERSAL = ipaddress.IPv6Network("2000::/3")
_SPECIAL_4 = (
    # IANA's special-purpose registry; Python's table before 3.13 knows only a part of the first one, and clouds live
    # there.
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(OSError):
    """The address is not a public one."""


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it is wrapped in another one.

    Loopback, private, link-local (with the metadata services of clouds), shared, reserved and multicast addresses
    are not.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return _is_public_4(address)
    inner = _wrapped(address)
    if inner is not None:
        return _is_public_4(inner)
    return address in _UNIVERSAL and address.is_global and not address.is_multicast


def _is_public_4(address: IPv4Address) -> bool:
    if any(address in network for network in _SPECIAL_4):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _wrapped(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to this one end up at: mapped, 6to4, Teredo, NAT64."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def checked_url(url: str, *, allow_private: bool) -> str:
    """The URL, if webhooks may go there: https (http too where private addresses are allowed), a host, no user, no
    fragment.

    Raises RequestInvalid. The host's addresses are checked at each delivery.
    """
    fault = _fault_of(url, allow_private)
    if fault is not None:
        raise RequestInvalid(f"url: {fault}", errors=[{"field": "url", "message": fault}])
    return url


def _fault_of(url: str, allow_private: bool) -> str | None:
    if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        return f"must be a URL of at most {URL_CHARACTERS_MAX} visible ASCII characters"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in (("https", "http") if allow_private else ("https",)):
        return "must begin with https://"
    if not host or port == 0:
        return "has no host or no port that exists"
    if parts.username is not None or parts.password is not None or parts.fragment:
        return "must not contain a user, a password or a fragment"
    if not allow_private and ((_is_literal(host) and not is_public(host)) or host == "localhost"):
        return "must be a public address"
    return None


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class Sender:
    """Sends webhooks. `start` before use."""

    def __init__(self, *, allow_private: bool, timeout_s: float = TIMEOUT_S) -> None:
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Makes the client."""
        self._session = aiohttp.ClientSession(
            # Every delivery makes its own connection: a kept one may be dead, and would have to be checked again.
            connector=aiohttp.TCPConnector(
                force_close=True, use_dns_cache=False, limit=0, socket_factory=self._socket, ttl_dns_cache=None
            ),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Lets go of every connection."""
        if self._session is not None:
            await self._session.close()

    async def send(self, url: str, event: str, secrets: Sequence[Secret], at: datetime, body: bytes) -> Answer:
        """One try. Whatever goes wrong is in the answer; only 2xx means taken."""
        if self._session is None:
            raise RuntimeError("start the sender first")
        headers = {
            "content-type": "application/json",
            "user-agent": "Kassa-Webhooks/1",
            "webhook-id": event,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signature(secrets, event, at, body),
        }
        began = time.monotonic()
        status: int | None = None
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                status = response.status
                await response.content.read(ANSWER_BYTES_MAX)
            error = _judged(status)
        except TimeoutError:
            # An answer whose head came in time counts, whatever its body does.
            error = f"no answer within {self._timeout_s:g} s" if status is None else _judged(status)
        except (aiohttp.ClientError, OSError, ValueError, asyncio.LimitOverrunError) as failure:
            error = _told(failure) if status is None else _judged(status)
        return Answer(status, error, int((time.monotonic() - began) * 1000))

    def _socket(self, info: Any) -> socket.socket:
        """The socket that will be connected to `info`'s address, if it may be."""
        family, kind, protocol, _, where = info
        if not self._allow_private and not is_public(where[0]):
            raise AddressRefused(f"{where[0]} is not a public address")
        made = socket.socket(family=family, type=kind, proto=protocol)
        made.setblocking(False)
        return made


def _judged(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    return f"answered {status}; redirects are not followed" if 300 <= status < 400 else f"answered {status}"


def _told(failure: Exception) -> str:
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, AddressRefused):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(failure).__name__}: {failure}"[:300]
