"""The OpenAPI 3.1 document, made of the routes and their types, so that it cannot say what the program does not do."""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec

from kassa.api.problem import CONTENT_TYPE as PROBLEM
from kassa.api.problem import problem, retry_after_s
from kassa.api.rest.fields import Nothing
from kassa.api.route import Route
from kassa.errors import (
    AuthForbidden,
    AuthInvalid,
    Busy,
    HeadersTooLarge,
    IdempotencyInProgress,
    IdempotencyKeyMissing,
    IdempotencyKeyReused,
    KassaError,
    MediaTypeUnsupported,
    OutcomeUnknown,
    RequestInvalid,
    RequestTimeout,
    RequestTooLarge,
    TooMany,
)

OPENAPI = "3.1.0"
_REF = "#/components/schemas/{name}"

_ALWAYS: tuple[type[KassaError], ...] = (
    RequestInvalid, RequestTimeout, HeadersTooLarge, Busy, OutcomeUnknown,
)  # fmt: skip
_WITH_API_KEY: tuple[type[KassaError], ...] = (AuthInvalid, AuthForbidden, TooMany)
_WITH_BODY: tuple[type[KassaError], ...] = (RequestTooLarge, MediaTypeUnsupported)
_WITH_KEY: tuple[type[KassaError], ...] = (
    IdempotencyKeyMissing, IdempotencyKeyReused, IdempotencyInProgress,
)  # fmt: skip

_ABOUT = """Take, refund and top up money. Amounts are whole minor units; times are RFC 3339 UTC.

Send your API key as `Authorization: Bearer sk_…`, and a fresh `Idempotency-Key` with each POST: sent again with the same \
key and body, a request happens once, and is answered with the first status and the thing as it stands now.

What is refused is told as a problem document (RFC 9457) with a `code`. Its `outcome` says what became of the key: \
`not_processed`, `processed`, or `unknown`, which means: repeat it with the same key. After 429 and 503 wait as long as \
`Retry-After` says."""

_RETRY_AFTER = {
    "Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait before a repeat"}
}

Outcome = Literal["not_processed", "processed", "unknown"]


class FieldError(msgspec.Struct):
    """What is wrong with one field."""

    field: str
    """Its path, such as payer.wallet."""
    message: str


class Problem(msgspec.Struct):
    """Why something was refused (RFC 9457). Facts follow under their own names."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    outcome: Annotated[Outcome, msgspec.Meta(description="What is known of the idempotency key, not of this call")]
    retryable: bool
    errors: list[FieldError]
    request_id: str | None


def document(routes: Sequence[Route], *, version: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The document of all routes. raw: schemas of fields that travel as ready-made JSON, by name."""
    types = _types(routes)
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(types, schemas, strict=True))
    with_raw(components, raw)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.pattern, {})[route.method.lower()] = _operation(route, schema_of, components)
    return told_outside(
        {
            "openapi": OPENAPI,
            "info": {
                "title": "Kassa",
                "version": version,
                "description": _ABOUT,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {
                    "api_key": {"type": "http", "scheme": "bearer", "description": "An API key, `sk_…`"}
                },
            },
            "tags": [{"name": tag} for tag in dict.fromkeys(_tag(route) for route in routes)],
        }
    )


def with_raw(components: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Says what the fields are that travel as ready-made JSON. raw: their schemas by name."""
    for component in components.values():
        properties = component.get("properties", {})
        for name in properties.keys() & raw.keys():
            if not properties[name]:
                properties[name] = raw[name]


def told_outside(document: Mapping[str, Any]) -> dict[str, Any]:
    """The types that answers are made of are called views inside; outside they are the things themselves."""
    text = re.sub(rb"\bListed_(\w+?)(?:View)?_(?=[\"])", rb"\1List", msgspec.json.encode(document))
    read: dict[str, Any] = msgspec.json.decode(text.replace(b'View"', b'"'))
    return read


def _types(routes: Iterable[Route]) -> list[Any]:
    types: dict[Any, None] = {Problem: None}
    for route in routes:
        for type_ in (route.body, route.query, *(answer.type for answer in route.answers.values())):
            if type_ is not None and not isinstance(type_, str):
                types[type_] = None
    return list(types)


def _operation(route: Route, schema_of: Mapping[Any, Any], components: Mapping[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.says,
        "tags": [_tag(route)],
        "parameters": [*_path_parameters(route), *_query_parameters(route, schema_of, components), *_headers(route)],
        "responses": _responses(route, schema_of),
    }
    if route.scope is not None:
        operation["security"] = [{"api_key": []}]
    if route.body is not None:
        media: dict[str, Any] = {"schema": {} if isinstance(route.body, str) else schema_of[route.body]}
        if route.example is not None:
            media["example"] = route.example
        operation["requestBody"] = {"required": route.body is not Nothing, "content": {"application/json": media}}
    return operation


def _operation_id(route: Route) -> str:
    words = [part.strip("{}").replace(".", "_") for part in route.pattern.split("/") if part not in ("", "v1")]
    return "_".join([route.method.lower(), *words])


def _tag(route: Route) -> str:
    parts = route.pattern.split("/")
    return parts[2] if parts[1] == "v1" else "meta"


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in route.pattern.split("/") if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1, "maxLength": 64}}
        for name in names
    ]


def _query_parameters(
    route: Route, schema_of: Mapping[Any, Any], components: Mapping[str, Any]
) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    schema = components[schema_of[route.query]["$ref"].rpartition("/")[2]]
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _without_null(field)}
        for name, field in schema["properties"].items()
    ]


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: what may be left out is simply not given."""
    kept = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    if field.get("default") is not None:
        kept["default"] = field["default"]
    return kept | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


def _headers(route: Route) -> list[dict[str, Any]]:
    headers: list[dict[str, Any]] = []
    if route.is_keyed:
        headers.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": route.needs_key,
                "description": "Names this request: sent again with the same key and body, it happens once.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
                "example": "order-123456-1",
            }
        )
    if route.prefers:
        headers.append(
            {
                "name": "Prefer",
                "in": "header",
                "required": False,
                "description": "`wait=N`: when it is final, within N ≤ 30 s, else 202. `respond-async`: 202 at once.",
                "schema": {"type": "string", "maxLength": 100, "pattern": "^[!-~]*$"},
                "example": "wait=5",
            }
        )
    return headers


def _responses(route: Route, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in route.answers.items():
        response: dict[str, Any] = {"description": answer.says}
        if isinstance(answer.type, str):
            response["content"] = {answer.type: {"schema": {"type": "string"}}}
        elif answer.type is not None:
            response["content"] = {"application/json": {"schema": schema_of[answer.type]}}
        if route.is_keyed:
            response["headers"] = {
                "Idempotent-Replayed": {"schema": {"type": "string", "enum": ["true"]}, "description": "A repeat"}
            }
        responses[str(status)] = response
    by_status: dict[int, list[type[KassaError]]] = {}
    for error in _problems(route):
        by_status.setdefault(error.status, []).append(error)
    for status, errors in sorted(by_status.items()):
        refusal = _refusal(status, errors)
        known = responses.get(str(status))
        if known is None:
            responses[str(status)] = refusal
        else:
            known["content"] = known.get("content", {}) | refusal["content"]
    return responses


def _problems(route: Route) -> list[type[KassaError]]:
    errors = [*_ALWAYS]
    if route.scope is not None:
        errors += _WITH_API_KEY
    if route.body is not None:
        errors += _WITH_BODY
    if route.is_keyed:
        errors += [error for error in _WITH_KEY if route.needs_key or error is not IdempotencyKeyMissing]
    return list(dict.fromkeys([*errors, *route.problems]))


def _refusal(status: int, errors: list[type[KassaError]]) -> dict[str, Any]:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Refused"
    codes = ", ".join(f"`{error.code}`" for error in errors)
    waits = {"headers": _RETRY_AFTER} if any(retry_after_s(error()) is not None for error in errors) else {}
    return waits | {
        "description": f"{phrase}: {codes}",
        "content": {
            PROBLEM: {
                "schema": {"$ref": _REF.format(name="Problem")},
                "examples": {error.code: {"value": problem(error(), "req_0123456789ab00000001")} for error in errors},
            }
        },
    }
