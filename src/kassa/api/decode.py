"""Bodies and query strings in: strict, bounded, and refused by the name of the field. Pure.

A body is checked against its type once by msgspec; what msgspec lets through and we do not (a key given twice, a NUL
that PostgreSQL cannot store) is looked for in the raw bytes.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from kassa.api.http import Request
from kassa.errors import MediaTypeUnsupported, RequestInvalid

Body = TypeVar("Body", bound=msgspec.Struct)

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_NAMED = re.compile(r"^Object (?:contains unknown|missing required) field `(?P<field>.*)`$", re.DOTALL)
_NUMBERS = frozenset({"limit"})
"""The fields of queries that are numbers."""
_WHOLE = re.compile(r"-?[0-9]{1,9}")
_FIELD_MAX = 100
"""Characters of a field's name in an answer: the caller chose it, so it is cut."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> None:
    """Raises _Repeated when a key comes twice. Called from the inside out; what it returns is not used."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise _Repeated(name)
        seen.add(name)


_decode = msgspec.json.Decoder().decode
_KEYS = re.compile(rb'"[ \t\r\n]*:')


def _is_surely_without_repeats(raw: bytes) -> bool:
    """Whether as many names are left after decoding as stand in the text. Tells in 1 µs what the exact look needs 10 for.

    Each name has a colon, and most strings have none. Without a backslash no string holds a quote, so a quote before a
    colon ends a name and nothing else.
    """
    names = _names(_decode(raw))
    return names == raw.count(b":") or (b"\\" not in raw and names == len(_KEYS.findall(raw)))


def _names(value: object) -> int:
    """How many names an object has, with those of the objects in it; lists are left to the exact look."""
    if type(value) is not dict:
        return -1
    count = len(value)
    for inner in value.values():
        kind = type(inner)
        if kind is dict or kind is list:
            count += _names(inner)
    return count


class _Repeated(Exception):
    def __init__(self, field: str) -> None:
        self.field = field


class BodyDecoder(Generic[Body]):
    """Reads bodies of one type."""

    __slots__ = ("_decode", "_pairs", "type")

    def __init__(self, type: type[Body]) -> None:
        self.type = type
        self._decode = msgspec.json.Decoder(type).decode
        self._pairs = json.JSONDecoder(object_pairs_hook=_no_repeats).decode

    def __call__(self, request: Request) -> Body:
        """The body of a request. Raises MediaTypeUnsupported, RequestInvalid."""
        kind = request.headers.get("content-type", "application/json")
        if kind != "application/json" and kind.split(";", 1)[0].strip().lower() != "application/json":
            raise MediaTypeUnsupported(content_type=kind[:_FIELD_MAX])
        return self.read(request.body)

    def optional(self, request: Request) -> Body:
        """The same where the body may be left out. Raises MediaTypeUnsupported, RequestInvalid."""
        return self(request) if request.body else self.read(b"{}")

    def read(self, raw: bytes) -> Body:
        """A body from its bytes. Raises RequestInvalid."""
        try:
            body = self._decode(raw)
            # Only now: what has passed its type is neither deep nor large.
            if not _is_surely_without_repeats(raw):
                self._pairs(raw.decode())
        except msgspec.ValidationError as error:
            raise _refusal(str(error)) from None
        except _Repeated as repeated:
            raise refused(repeated.field, "is given twice") from None
        except (msgspec.DecodeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            what = str(error) if isinstance(error, msgspec.DecodeError) else "it is not UTF-8 or too deeply nested"
            raise RequestInvalid(
                "The body is not JSON.", errors=[{"field": "", "message": f"the body cannot be read: {what}"}]
            ) from None
        if b"\\u0000" in raw:
            _refuse_nul(msgspec.to_builtins(body), "")
        return body


def read_query(request: Request, type: type[Body]) -> Body:
    """The query of a request. Raises RequestInvalid.

    Strict: msgspec's lax mode would take `null` for nothing and a number for a time.
    """
    query: Mapping[str, str] = request.query
    try:
        read = msgspec.convert({name: _number(name, text) for name, text in query.items()}, type)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    for name, text in query.items():
        if "\x00" in text:
            raise refused(name, "holds a NUL character")
    return read


def _number(name: str, text: str) -> str | int:
    """A query is text; what is a number there has the form of one."""
    return int(text) if name in _NUMBERS and _WHOLE.fullmatch(text) else text


def refused(field: str, message: str) -> RequestInvalid:
    """A request whose field is wrong."""
    field = field[:_FIELD_MAX]
    return RequestInvalid(f"{field} {message}." if field else None, errors=[{"field": field, "message": message}])


def _refusal(message: str) -> RequestInvalid:
    """msgspec's message as a problem that names the field: path and what is wrong with it."""
    found = _PATH.match(message)
    what, path = (found["what"], found["path"] or "") if found is not None else (message, "")
    named = _NAMED.match(what)
    if named is None:
        return refused(path, f"is not valid: {what[0].lower()}{what[1:]}".replace("`", ""))
    field = f"{path}.{named['field']}" if path else named["field"]
    return refused(field, "is required" if "missing" in what else "is not a field of this request")


def _refuse_nul(value: Any, path: str) -> None:
    if isinstance(value, str) and "\x00" in value:
        raise refused(path, "holds a NUL character")
    if isinstance(value, dict):
        for name, inner in value.items():
            where = f"{path}.{name}" if path else name
            if "\x00" in name:
                raise refused(path, "has a key with a NUL character")
            _refuse_nul(inner, where)
    if isinstance(value, list):
        for inner in value:
            _refuse_nul(inner, path)
