"""The control door of a WeChat Pay sandbox: what payer, bank and bad luck do. On the same port, for this machine only."""

import json
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs

from kassa.channels.sandbox.books import Charge, Settings
from kassa.channels.sandbox.faults import FaultInvalid, Faults, read_fault
from kassa.channels.sandbox.http import Answer, Request
from kassa.channels.sandbox.identity import Identity
from kassa.channels.sandbox.wechat_operations import NotPossible, Operations

PREFIX = "/_sandbox"
_REFUND_STATES = ("ABNORMAL", "REVERSED", "CLOSED", "SUCCESS")
_KEY_KINDS = ("certificate", "public_key")
_CALLBACK_KEYS = ("as_asked", "public_key", "certificate")
ADVANCE_S_MAX = 10 * 365 * 86_400

Body = dict[str, Any]


class Control:
    """One method per call. `wake` is called when a callback may be due, `keep` stores a changed identity."""

    def __init__(
        self, operations: Operations, faults: Faults, *, wake: Callable[[], None], keep: Callable[[Identity], None]
    ) -> None:
        self._operations = operations
        self._books = operations.books
        self._faults = faults
        self._wake = wake
        self._keep = keep
        self._calls: dict[tuple[str, str], Callable[[Body, str], Body]] = {
            ("GET", ""): self._credentials,
            ("POST", "/pay"): self._pay,
            ("POST", "/decline"): self._decline,
            ("GET", "/faults"): self._armed_faults,
            ("POST", "/faults"): self._arm_fault,
            ("DELETE", "/faults"): self._clear_faults,
            ("GET", "/books"): self._show_books,
            ("POST", "/rotate_key"): self._rotate_key,
            ("GET", "/clock"): self._show_clock,
            ("POST", "/clock"): self._advance_clock,
            ("POST", "/refunds"): self._change_refund,
            ("GET", "/settings"): self._show_settings,
            ("POST", "/settings"): self._change_settings,
        }

    def answer(self, request: Request) -> Answer:
        """The control door's answer to anybody; it opens for this machine only."""
        if not ip_address(request.peer).is_loopback:
            return _json(403, {"error": "the control door is for this machine only"})
        path = request.path.removeprefix(PREFIX).rstrip("/")
        call = self._calls.get((request.method, path))
        if call is None:
            is_known = any(known == path for _, known in self._calls)
            return _json(405 if is_known else 404, {"error": f"there is no {request.method} {PREFIX}{path}"})
        try:
            return _json(200, call(_read(request.body), request.query))
        except NotPossible as refusal:
            return _json(refusal.status, {"error": str(refusal)})
        except FaultInvalid as refusal:
            return _json(400, {"error": str(refusal)})

    def _credentials(self, asked: Body, query: str) -> Body:
        return dict(self._operations.identity.credentials())

    # The payer

    def _pay(self, asked: Body, query: str) -> Body:
        _only(asked, "code_url", "out_trade_no", "payer", "after_close")
        openid, after_close = _text(asked, "payer"), _flag(asked, "after_close")
        charge = self._find(asked)
        by_code = asked.get("code_url") is not None
        paid = self._operations.pay(charge, openid=openid, after_close=after_close, by_code=by_code)
        self._wake()
        return _charge_shown(paid)

    def _decline(self, asked: Body, query: str) -> Body:
        _only(asked, "code_url", "out_trade_no", "payer")
        return _charge_shown(self._operations.decline(self._find(asked)))

    def _find(self, asked: Body) -> Charge:
        out_trade_no, code_url = _text(asked, "out_trade_no"), _text(asked, "code_url")
        if out_trade_no is None and code_url is None:
            raise NotPossible(400, "code_url or out_trade_no is needed")
        return self._operations.find(out_trade_no=out_trade_no, code_url=code_url)

    # Bad luck

    def _armed_faults(self, asked: Body, query: str) -> Body:
        return {"faults": self._faults.shown()}

    def _arm_fault(self, asked: Body, query: str) -> Body:
        fault = read_fault(asked)
        self._faults.arm(fault)
        return fault.shown()

    def _clear_faults(self, asked: Body, query: str) -> Body:
        return {"cleared": self._faults.clear()}

    # The provider itself

    def _show_books(self, asked: Body, query: str) -> Body:
        """Everything; `?out_trade_no=…` one order; `?totals=1` counts and sums only."""
        fields = parse_qs(query)
        if fields.get("totals"):
            return self._books.totals()
        return self._books.shown(fields.get("out_trade_no", [None])[0])

    def _rotate_key(self, asked: Body, query: str) -> Body:
        """A new platform certificate, which signs all callbacks from now on; or `{"kind": "public_key"}`: a new bare key."""
        _only(asked, "kind")
        kind = asked.get("kind", "certificate")
        if kind not in _KEY_KINDS:
            raise NotPossible(400, f"kind must be one of {', '.join(_KEY_KINDS)}")
        identity = self._operations.identity
        rotated = identity.with_new_certificate() if kind == "certificate" else identity.with_new_public_key()
        self._keep(rotated)
        self._operations.identity = rotated
        self._books.change_settings(callback_key=kind)
        return dict(rotated.credentials())

    def _show_clock(self, asked: Body, query: str) -> Body:
        return {"now": self._books.now(), "advanced_s": self._books.settings.clock_offset_s}

    def _advance_clock(self, asked: Body, query: str) -> Body:
        _only(asked, "advance_s")
        seconds = asked.get("advance_s")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= ADVANCE_S_MAX:
            raise NotPossible(400, f"advance_s must be a number of seconds from 0 to {ADVANCE_S_MAX}")
        self._books.change_settings(clock_offset_s=self._books.settings.clock_offset_s + seconds)
        self._wake()
        return self._show_clock(asked, query)

    def _change_refund(self, asked: Body, query: str) -> Body:
        _only(asked, "out_refund_no", "state")
        number, state = _text(asked, "out_refund_no"), asked.get("state")
        if number is None:
            raise NotPossible(400, "out_refund_no is needed")
        if state not in _REFUND_STATES:
            raise NotPossible(400, f"state must be one of {', '.join(_REFUND_STATES)}")
        refund = self._operations.change_refund(number, state)
        self._wake()
        return {"out_refund_no": refund.out_refund_no, "refund_id": refund.refund_id, "state": refund.state}

    def _show_settings(self, asked: Body, query: str) -> Body:
        return settings_shown(self._books.settings)

    def _change_settings(self, asked: Body, query: str) -> Body:
        self._books.change_settings(**read_settings(asked))
        self._wake()
        return settings_shown(self._books.settings)


def settings_shown(settings: Settings) -> Body:
    """All of them but the clock, which has a call of its own."""
    return {name: getattr(settings, name) for name in _SETTINGS}


def read_settings(asked: Body) -> Body:
    """Checked changes of settings. Raises NotPossible."""
    _only(asked, *_SETTINGS)
    for name, value in asked.items():
        if not _SETTINGS[name](value):
            raise NotPossible(400, f"{name} cannot be {value!r}")
    return asked


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least


_SETTINGS: dict[str, Callable[[object], bool]] = {
    "refund_gap_s": lambda value: _is_number(value, 0),
    "refund_delay_ms": lambda value: type(value) is int and value >= 0,
    "callback_speed": lambda value: _is_number(value, 0.001),
    "signtest_every": lambda value: type(value) is int and value >= 0,
    "callback_key": lambda value: value in _CALLBACK_KEYS,
    "has_funds": lambda value: isinstance(value, bool),
}


def _charge_shown(charge: Charge) -> Body:
    return {
        "out_trade_no": charge.out_trade_no,
        "transaction_id": charge.transaction_id,
        "amount": charge.total,
        "state": charge.state,
        "openid": charge.openid,
    }


def _read(body: bytes) -> Body:
    if not body.strip():
        return {}
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise NotPossible(400, "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise NotPossible(400, "the body is not a JSON object")
    return asked


def _only(asked: Body, *names: str) -> None:
    unknown = asked.keys() - set(names)
    if unknown:
        raise NotPossible(400, f"unknown field: {', '.join(sorted(unknown))}")


def _text(asked: Body, name: str) -> str | None:
    value = asked.get(name)
    if value is not None and not isinstance(value, str):
        raise NotPossible(400, f"{name} must be a text")
    return value


def _flag(asked: Body, name: str) -> bool:
    value = asked.get(name, False)
    if not isinstance(value, bool):
        raise NotPossible(400, f"{name} must be true or false")
    return value


def _json(status: int, shown: Body) -> Answer:
    body = json.dumps(shown, ensure_ascii=False).encode()
    return Answer(status, {"Content-Type": "application/json; charset=utf-8"}, body)
