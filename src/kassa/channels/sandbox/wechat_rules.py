"""What WeChat Pay accepts, as pure checks: fields of an order and of a refund, and which refund still fits.

Raises `Refusal`, the provider's own error, at the first rule that is broken.
"""

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

from kassa.channels.sandbox.books import Charge, Refund

TRADE_TYPES = {"native": "NATIVE", "jsapi": "JSAPI", "app": "APP", "h5": "MWEB"}
ORDER_LIFE_S = 7 * 86_400
"""Of an order without time_expire."""
TIME_EXPIRE_LEAST_S = 60
TIME_EXPIRE_MOST_S = 90 * 86_400
REFUNDS_MAX = 50
"""Of one order."""
REFUND_WINDOW_S = 365 * 86_400
AMOUNT_MAX = 2**53 - 1

_OUT_TRADE_NO = re.compile(r"[0-9A-Za-z_\-|*]{6,32}")
_OUT_REFUND_NO = re.compile(r"[0-9A-Za-z_\-|*@]{1,64}")
_CHINA = timezone(timedelta(hours=8))

Fields = Mapping[str, Any]


@dataclass(eq=False)
class Refusal(Exception):
    """The provider says no: HTTP status, its error code, a sentence, and where the fault lies."""

    status: int
    code: str
    message: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"code": self.code, "message": self.message}
        return {**shown, "detail": dict(self.detail)} if self.detail else shown


def parameter(name: str, issue: str, value: object = None, location: str = "body") -> Refusal:
    """400 PARAM_ERROR that names the field, as the provider does."""
    detail = {"field": name, "value": value, "issue": issue, "location": location}
    return Refusal(400, "PARAM_ERROR", f"参数错误: {name} {issue}", detail)


def invalid(message: str) -> Refusal:
    """400 INVALID_REQUEST: every field is well-formed, and yet it cannot be."""
    return Refusal(400, "INVALID_REQUEST", message)


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object in it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise parameter("/", "is not JSON") from None
    if not isinstance(fields, dict):
        raise parameter("/", "is not a JSON object")
    return fields


def canonical(*parts: object) -> str:
    """One spelling for requests that mean the same; how it was sent does not count."""
    return json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def wire_time(seconds: float) -> str:
    """RFC 3339 in China's time, whole seconds, as the provider writes it."""
    return datetime.fromtimestamp(seconds, _CHINA).isoformat(timespec="seconds")


# Orders


def check_order(kind: str, order: Fields, *, mchid: str, appid: str) -> None:
    """All fields of an order of this kind (native, jsapi, app, h5), each by itself."""
    check_mchid(order.get("mchid"), mchid)
    if _text(order, "/appid", 1, 32) != appid:
        raise Refusal(400, "APPID_MCHID_NOT_MATCH", "appid与mchid不匹配")
    _text(order, "/description", 1, 127)
    number = _text(order, "/out_trade_no", 6, 32)
    if not _OUT_TRADE_NO.fullmatch(number):
        raise parameter("/out_trade_no", "may only hold 0-9A-Za-z_-|*", number)
    check_notify_url(_text(order, "/notify_url", 1, 255))
    amount = _object(order, "/amount")
    check_amount(amount, "/amount/total")
    check_currency(amount, required=False)
    _optional_text(order, "/attach", 128)
    _optional_text(order, "/goods_tag", 32)
    if order.get("time_expire") is not None:
        read_time(order["time_expire"], "/time_expire")
    for name in ("detail", "settle_info", "scene_info"):
        if order.get(name) is not None:
            _object(order, f"/{name}")
    if kind == "jsapi":
        _text(_object(order, "/payer"), "/payer/openid", 1, 128)
    if kind == "h5":
        _check_h5_scene(_object(order, "/scene_info"))


def check_mchid(given: object, mchid: str, location: str = "body") -> None:
    """The order's merchant must be the one who signed."""
    if not isinstance(given, str) or not given:
        raise parameter("/mchid", "is missing", given, location)
    if given != mchid:
        raise parameter("/mchid", "is not the merchant who signed", given, location)


def expires_at(order: Fields, *, now: float) -> float:
    """When a new order stops being payable."""
    if order.get("time_expire") is None:
        return now + ORDER_LIFE_S
    at = read_time(order["time_expire"], "/time_expire")
    if at < now + TIME_EXPIRE_LEAST_S:
        raise parameter("/time_expire", "must be at least one minute ahead", order["time_expire"])
    if at > now + TIME_EXPIRE_MOST_S:
        raise parameter("/time_expire", "must be at most 90 days ahead", order["time_expire"])
    return at


def check_same_order(charge: Charge, request: str) -> None:
    """An order under a number that is taken: the same one is welcome, as long as it is open."""
    if charge.state in ("SUCCESS", "REFUND"):
        raise Refusal(400, "ORDER_PAID", "该订单已支付")
    if charge.state == "CLOSED":
        raise Refusal(400, "ORDER_CLOSED", "该订单已关闭")
    if charge.request != request:
        raise invalid("商户订单号重复: 请求参数与原订单不一致")


def _check_h5_scene(scene: Fields) -> None:
    address = _text(scene, "/scene_info/payer_client_ip", 1, 45)
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise parameter("/scene_info/payer_client_ip", "is not an IP address", address) from None
    _text(_object(scene, "/scene_info/h5_info"), "/scene_info/h5_info/type", 1, 32)


# Refunds


def check_refund(request: Fields) -> None:
    """All fields of a refund, each by itself."""
    if request.get("transaction_id") is None and request.get("out_trade_no") is None:
        raise parameter("/transaction_id", "or out_trade_no is needed")
    _optional_text(request, "/transaction_id", 32)
    _optional_text(request, "/out_trade_no", 32)
    number = _text(request, "/out_refund_no", 1, 64)
    if not _OUT_REFUND_NO.fullmatch(number):
        raise parameter("/out_refund_no", "may only hold 0-9A-Za-z_-|*@", number)
    _optional_text(request, "/reason", 80)
    if request.get("notify_url") is not None:
        check_notify_url(_text(request, "/notify_url", 8, 256))
    amount = _object(request, "/amount")
    check_amount(amount, "/amount/refund")
    check_amount(amount, "/amount/total")
    check_currency(amount, required=True)
    if request.get("goods_detail") is not None and not isinstance(request["goods_detail"], list):
        raise parameter("/goods_detail", "is not a list", request["goods_detail"])


def check_refund_fits(charge: Charge, earlier: Sequence[Refund], request: Fields, *, now: float, gap_s: float) -> None:
    """Whether one more refund of this charge is possible, and already allowed."""
    if charge.state not in ("SUCCESS", "REFUND") or charge.paid_at is None:
        raise invalid("订单未支付, 不能退款")
    if request["amount"]["total"] != charge.total:
        raise invalid("订单金额与原订单不一致")
    if now > charge.paid_at + REFUND_WINDOW_S:
        raise invalid("订单已超过可退款的最大期限(一年)")
    if len(earlier) >= REFUNDS_MAX:
        raise invalid("该订单的退款次数已达上限(50次)")
    taken = sum(refund.amount for refund in earlier if refund.takes_money)
    if taken + request["amount"]["refund"] > charge.total:
        raise invalid("退款金额大于订单可退金额")
    if earlier and now < max(refund.created_at for refund in earlier) + gap_s:
        raise Refusal(429, "FREQUENCY_LIMITED", "同一笔订单的两次退款需间隔1分钟以上")


# Single fields


def check_notify_url(url: str) -> None:
    """Where callbacks go: http or https with a host, and no query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise parameter("/notify_url", "is not an http or https address", url)
    if "?" in url or "#" in url:
        raise parameter("/notify_url", "must not carry a query", url)


def check_amount(amount: Fields, name: str) -> None:
    """Whole fen, at least one."""
    value = amount.get(name.rpartition("/")[2])
    if type(value) is not int or not 1 <= value <= AMOUNT_MAX:
        raise parameter(name, "must be a whole number of fen, at least 1", value)


def check_currency(amount: Fields, *, required: bool) -> None:
    """CNY only; an order may leave it out."""
    value = amount.get("currency")
    if value != "CNY" and (required or value is not None):
        raise parameter("/amount/currency", "must be CNY", value)


def read_time(value: object, name: str) -> float:
    """Seconds since 1970 of an RFC 3339 time with its zone."""
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) and "T" in value else None
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise parameter(name, "is not an RFC 3339 time", value)
    return at.astimezone(UTC).timestamp()


def _text(fields: Fields, name: str, least: int, most: int) -> str:
    value = fields.get(name.rpartition("/")[2])
    if value is None:
        raise parameter(name, "is missing")
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise parameter(name, f"must be a text of {least} to {most} characters", value)
    return value


def _optional_text(fields: Fields, name: str, most: int) -> None:
    if fields.get(name.rpartition("/")[2]) is not None:
        _text(fields, name, 1, most)


def _object(fields: Fields, name: str) -> Fields:
    value = fields.get(name.rpartition("/")[2])
    if not isinstance(value, dict):
        raise parameter(name, "is missing" if value is None else "is not an object", value)
    return value
