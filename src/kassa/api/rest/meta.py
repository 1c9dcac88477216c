"""About the API itself: its document, its health, its numbers. No API key is asked for."""

from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files

import msgspec

from kassa.api.http import Request, Response
from kassa.api.route import Answer, Route
from kassa.observability.metrics import CONTENT_TYPE, Metrics


class Health(msgspec.Struct, frozen=True):
    """The process runs."""

    status: str


class Check(msgspec.Struct, frozen=True):
    """One thing that should be so before a payment is taken."""

    name: str
    ok: bool
    says: str
    required: bool = True
    """False: payments are taken without it, and what it should do waits."""


class Readiness(msgspec.Struct, frozen=True):
    """Whether a payment can be taken now, and if not, why."""

    ready: bool
    checks: list[Check]


Checks = Callable[[], Awaitable[Sequence[Check]]]

_ALIVE = Response(200, msgspec.json.encode(Health("ok")))
_NO_STORE = (("Cache-Control", "no-store"),)
_PAGE = (
    # The page may load what it brings along, and nothing else from anywhere.
    ("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"),
    ("X-Content-Type-Options", "nosniff"),
)
_FILES = {
    "/docs": ("index.html", "text/html; charset=utf-8"),
    "/docs/docs.css": ("docs.css", "text/css; charset=utf-8"),
    "/docs/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}


Measuring = Callable[[], Awaitable[None]]
"""Brings up to date what is not counted as it happens."""


def routes(checks: Checks, metrics: Metrics, measure: Measuring) -> list[Route]:
    """Health, readiness and metrics."""

    async def ready(request: Request) -> Response:
        found = list(await checks())
        is_ready = all(check.ok for check in found if check.required)
        return Response(200 if is_ready else 503, msgspec.json.encode(Readiness(is_ready, found)), _NO_STORE)

    return [
        Route(
            "GET", "/readyz", "Whether a payment can be taken now.", ready,
            {200: Answer(Readiness, "Ready"), 503: Answer(Readiness, "Not ready; the checks say why")},
        ),
        *numbers(metrics, measure),
    ]  # fmt: skip


def numbers(metrics: Metrics, measure: Measuring) -> list[Route]:
    """What also a process without the API tells."""

    async def page(request: Request) -> Response:
        await measure()
        return Response(200, metrics.render(), content_type=CONTENT_TYPE)

    return [
        Route("GET", "/healthz", "Whether the process runs.", lambda request: _ALIVE, {200: Answer(Health, "It runs")}),
        Route(
            "GET", "/metrics", "Numbers for Prometheus.", page,
            {200: Answer("text/plain", "The text format of Prometheus")},
        ),
    ]  # fmt: skip


def documentation(document: bytes, messages: bytes) -> list[Route]:
    """The documents (of REST, and of what travels over brokers), and the page that draws the first; all that it needs comes
    with the program."""
    drawn = [_file(pattern, name, kind) for pattern, (name, kind) in _FILES.items()]
    described, over_brokers = Response(200, document), Response(200, messages)
    return [
        Route(
            "GET", "/openapi.json", "This document.", lambda request: described,
            {200: Answer("application/json", "OpenAPI 3.1")},
        ),
        Route(
            "GET", "/asyncapi.json", "What travels over message brokers.", lambda request: over_brokers,
            {200: Answer("application/json", "AsyncAPI 3.0")},
        ),
        *drawn,
    ]  # fmt: skip


def _file(pattern: str, name: str, kind: str) -> Route:
    content = (files("kassa.api") / "docs" / name).read_bytes()
    answer = Response(200, content, _PAGE, kind)
    return Route(
        "GET", pattern, "The page that draws this document.", lambda request: answer,
        {200: Answer(kind.split(";")[0], "The page")},
    )  # fmt: skip
