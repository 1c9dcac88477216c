"""What the sandbox's WeChat Pay does: orders, payments, closes, refunds, and the callbacks that follow from them.

Each operation is one transaction of the books. Refusals are the provider's own errors; nothing here knows of HTTP.
"""

import json
import secrets
from base64 import b64decode
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.hashes import SHA1

from kassa.channels.sandbox import wechat_rules as rules
from kassa.channels.sandbox.books import Books, Charge, Notice, Refund
from kassa.channels.sandbox.identity import Identity

_OAEP = OAEP(mgf=MGF1(SHA1()), algorithm=SHA1(), label=None)
"""The provider's padding for sensitive fields."""

CODE_LIFE_S = 2 * 3600
"""Of a code_url and a prepay_id; placing the same order again renews it."""
_STATES = {"NOTPAY": "订单未支付", "SUCCESS": "支付成功", "REFUND": "订单发生过退款", "CLOSED": "订单已关闭"}

Wire = dict[str, Any]


class NotPossible(Exception):
    """The payer, or the bank, cannot do that now; the message says why. `status` is the control door's answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Operations:
    """The provider behind its wire. `identity` is replaced when a key rotates."""

    def __init__(self, books: Books, identity: Identity) -> None:
        self.books = books
        self.identity = identity

    # The merchant's side

    def create(self, kind: str, order: Wire, *, serial: str, extra: int = 0) -> Wire:
        """Place an order, or find the same one again. `extra` is a planted mistake in its amount."""
        rules.check_order(kind, order, mchid=self.identity.mchid, appid=self.identity.appid)
        request = rules.canonical(kind, order)
        now = self.books.now()
        with self.books.transaction():
            charge = self._current(order["out_trade_no"])
            if charge is None:
                charge = self._new_charge(kind, order, request, serial=serial, extra=extra, now=now)
            else:
                rules.check_same_order(charge, request)
            charge = replace(charge, code_until=now + CODE_LIFE_S)
            self.books.put_charge(charge)
        return _what_the_payer_needs(kind, charge)

    def query(self, out_trade_no: str | None, transaction_id: str | None) -> Wire:
        """The order as it stands now, by the merchant's number or by ours."""
        with self.books.transaction():
            if out_trade_no is not None:
                charge = self._current(out_trade_no)
            else:
                charge = self.books.charge_by_transaction(transaction_id or "")
        if charge is None:
            raise _order_not_exist()
        return self._transaction(charge)

    def close(self, out_trade_no: str) -> None:
        """An unpaid order can be closed as often as one likes."""
        with self.books.transaction():
            charge = self._current(out_trade_no)
            if charge is None:
                raise _order_not_exist()
            if charge.state in ("SUCCESS", "REFUND"):
                raise rules.Refusal(400, "ORDER_PAID", "该订单已支付")
            self.books.put_charge(replace(charge, state="CLOSED"))

    def refund(self, request: Wire, *, serial: str) -> Wire:
        """Accept a refund (acceptance only: it is PROCESSING), or find the same one again."""
        rules.check_refund(request)
        with self.books.transaction():
            charge = self._charge_to_refund(request)
            same = self.books.refund(request["out_refund_no"])
            if same is not None:
                if same.request != rules.canonical(request):
                    raise rules.invalid("商户退款单号重复: 请求参数与原退款单不一致")
                return self._refund(same, charge)
            refund = self._new_refund(charge, request, serial=serial)
            self.books.put_refund(refund)
            self.books.put_charge(replace(charge, state="REFUND"))
        return self._refund(refund, charge)

    def refund_query(self, out_refund_no: str) -> Wire:
        """The refund as it stands now."""
        refund = self.books.refund(out_refund_no)
        if refund is None:
            raise rules.Refusal(404, "RESOURCE_NOT_EXISTS", "退款单不存在")
        return self._refund(refund, self._charge_of(refund))

    def abnormal_refund(self, refund_id: str, request: Wire, *, serial: str) -> Wire:
        """Try an ABNORMAL refund another way: to the payer's bank card, or to the merchant's own.

        serial: the platform key that names and card numbers are encrypted for.
        """
        if request.get("type") not in ("USER_BANK_CARD", "MERCHANT_BANK_CARD"):
            raise rules.parameter("/type", "must be USER_BANK_CARD or MERCHANT_BANK_CARD", request.get("type"))
        for name in ("bank_account", "real_name"):
            if request.get(name) is not None and not self._can_read(request[name], serial):
                raise rules.parameter(f"/{name}", "is not encrypted for the key that Wechatpay-Serial names")
        with self.books.transaction():
            refund = self.books.refund_by_id(refund_id)
            if refund is None or refund.out_refund_no != request.get("out_refund_no"):
                raise rules.Refusal(404, "RESOURCE_NOT_EXISTS", "退款单不存在")
            if refund.state not in ("ABNORMAL", "PROCESSING"):
                raise rules.invalid("该退款单不是退款异常状态")
            if refund.state == "ABNORMAL":
                refund = replace(refund, state="PROCESSING", due_at=self._refund_due_at())
                self.books.put_refund(refund)
        return self._refund(refund, self._charge_of(refund))

    # The payer's and the bank's side

    def find(self, *, out_trade_no: str | None, code_url: str | None) -> Charge:
        """The order that the payer looks at. Raises NotPossible."""
        charge = self._current(out_trade_no) if out_trade_no else self.books.charge_by_code(code_url or "")
        if charge is None:
            raise NotPossible(404, "there is no such order")
        return charge

    def pay(self, charge: Charge, *, openid: str | None, after_close: bool, by_code: bool) -> Charge:
        """The payer pays, and the callback is due. Paying a closed or expired order is a fault that must be asked for.

        Raises NotPossible.
        """
        now = self.books.now()
        if charge.state in ("SUCCESS", "REFUND"):
            raise NotPossible(409, "this order is paid already")
        if not after_close:
            if charge.state == "CLOSED":
                raise NotPossible(409, 'this order is closed; a late success has to be asked for: "after_close": true')
            if now >= charge.expires_at:
                raise NotPossible(
                    409, 'this order has expired; a late success has to be asked for: "after_close": true'
                )
            if by_code and now >= charge.code_until:
                raise NotPossible(409, "this code is older than two hours; place the same order again to renew it")
        with self.books.transaction():
            paid = replace(
                charge,
                state="SUCCESS",
                transaction_id=_transaction_id(now),
                openid=openid or self._named_payer(charge) or f"o{secrets.token_urlsafe(20)}",
                paid_at=now,
            )
            self.books.put_charge(paid)
            notify_url = json.loads(paid.request)[1]["notify_url"]
            self._put_notice(
                "transaction", paid.out_trade_no, "SUCCESS", notify_url, paid.serial, self._transaction(paid)
            )
        return paid

    def decline(self, charge: Charge) -> Charge:
        """The payer does not pay. The order stays open and nobody is told: that is how the provider does it."""
        declined = replace(charge, declines=charge.declines + 1)
        with self.books.transaction():
            self.books.put_charge(declined)
        return declined

    def change_refund(self, out_refund_no: str, state: str) -> Refund:
        """The bank's surprises: ABNORMAL, REVERSED (it succeeded, and the money came back), CLOSED, SUCCESS.

        On the wire REVERSED is CLOSED: the provider has no other word. Raises NotPossible.
        """
        with self.books.transaction():
            refund = self.books.refund(out_refund_no)
            if refund is None:
                raise NotPossible(404, "there is no such refund")
            if state == "REVERSED" and refund.state != "SUCCESS":
                raise NotPossible(409, f"only a refund that succeeded can come back; this one is {refund.state}")
            if refund.state in ("CLOSED", "REVERSED"):
                raise NotPossible(409, f"this refund is {refund.state} for good")
            return self._move_refund(refund, state)

    def let_refunds_succeed(self) -> int:
        """Those whose time has come; how many there were. Bounded, so that the wire is not kept waiting."""
        due = self.books.due_refunds(100)
        for refund in due:
            with self.books.transaction():
                self._move_refund(refund, "SUCCESS")
        return len(due)

    # Inside

    def _can_read(self, secret: object, serial: str) -> bool:
        """Whether a sensitive field was encrypted for our key. What it says does not matter here."""
        key = self.identity.signing_keys.get(serial)
        if key is None or not isinstance(secret, str):
            return False
        try:
            key.decrypt(b64decode(secret, validate=True), _OAEP)
        except ValueError:
            return False
        return True

    def _current(self, out_trade_no: str) -> Charge | None:
        """The order; one that nobody paid for seven days after its end is closed by the provider itself."""
        charge = self.books.charge(out_trade_no)
        if charge is None or charge.state != "NOTPAY" or self.books.now() < charge.expires_at + rules.ORDER_LIFE_S:
            return charge
        closed = replace(charge, state="CLOSED")
        self.books.put_charge(closed)
        return closed

    def _new_charge(self, kind: str, order: Wire, request: str, *, serial: str, extra: int, now: float) -> Charge:
        return Charge(
            out_trade_no=order["out_trade_no"],
            state="NOTPAY",
            trade_type=rules.TRADE_TYPES[kind],
            total=order["amount"]["total"] + extra,
            request=request,
            prepay_id=f"wx{_stamp(now)}{secrets.token_hex(10)}",
            code_url=f"weixin://wxpay/bizpayurl?pr={secrets.token_hex(8)}",
            code_until=now,
            serial=serial,
            created_at=now,
            expires_at=rules.expires_at(order, now=now),
        )

    def _new_refund(self, charge: Charge, request: Wire, *, serial: str) -> Refund:
        now = self.books.now()
        earlier = self.books.refunds_of(charge.out_trade_no)
        rules.check_refund_fits(charge, earlier, request, now=now, gap_s=self.books.settings.refund_gap_s)
        if not self.books.settings.has_funds:
            raise rules.Refusal(403, "NOT_ENOUGH", "商户账户余额不足")
        return Refund(
            out_refund_no=request["out_refund_no"],
            refund_id=f"503{_stamp(now)[:8]}{secrets.randbelow(10**17):017d}",
            out_trade_no=charge.out_trade_no,
            state="PROCESSING",
            amount=request["amount"]["refund"],
            request=rules.canonical(request),
            serial=serial,
            created_at=now,
            due_at=self._refund_due_at(),
        )

    def _charge_to_refund(self, request: Wire) -> Charge:
        out_trade_no, transaction_id = request.get("out_trade_no"), request.get("transaction_id")
        if transaction_id is not None:
            charge = self.books.charge_by_transaction(transaction_id)
        else:
            charge = self.books.charge(str(out_trade_no))
        if charge is None:
            raise rules.Refusal(404, "RESOURCE_NOT_EXISTS", "订单不存在")
        if out_trade_no is not None and charge.out_trade_no != out_trade_no:
            raise rules.invalid("transaction_id与out_trade_no不是同一笔订单")
        return charge

    def _charge_of(self, refund: Refund) -> Charge:
        charge = self.books.charge(refund.out_trade_no)
        if charge is None:
            raise NotPossible(500, "the books hold a refund without its order")
        return charge

    def _named_payer(self, charge: Charge) -> str | None:
        payer = json.loads(charge.request)[1].get("payer")
        openid = payer.get("openid") if isinstance(payer, dict) else None
        return openid if isinstance(openid, str) else None

    def _refund_due_at(self) -> float:
        return self.books.now() + self.books.settings.refund_delay_ms / 1000

    def _move_refund(self, refund: Refund, state: str) -> Refund:
        is_success = state == "SUCCESS"
        moved = replace(
            refund, state=state, due_at=None, succeeded_at=self.books.now() if is_success else refund.succeeded_at
        )
        self.books.put_refund(moved)
        notify_url = json.loads(refund.request)[0].get("notify_url")
        if notify_url:
            plaintext = self._refund_notice(moved, self._charge_of(moved))
            self._put_notice("refund", refund.out_refund_no, _wire_state(moved), notify_url, refund.serial, plaintext)
        return moved

    def _put_notice(self, kind: str, number: str, event: str, url: str, serial: str, plaintext: Wire) -> None:
        self.books.put_notice(
            Notice(
                id=_notice_id(),
                kind=kind,
                number=number,
                event_type=f"{kind.upper()}.{event}",
                url=url,
                serial=serial,
                plaintext=json.dumps(plaintext, ensure_ascii=False, separators=(",", ":")),
                next_at=self.books.now(),
            )
        )

    # How things look on the wire

    def _transaction(self, charge: Charge) -> Wire:
        order = json.loads(charge.request)[1]
        shown: Wire = {
            "appid": self.identity.appid,
            "mchid": self.identity.mchid,
            "out_trade_no": charge.out_trade_no,
            "trade_state": charge.state,
            "trade_state_desc": _STATES[charge.state],
            "promotion_detail": [],
        }
        if "attach" in order:
            shown["attach"] = order["attach"]
        if charge.paid_at is None:
            return {**shown, "amount": {"total": charge.total, "currency": "CNY", "payer_currency": "CNY"}}
        return {
            **shown,
            "transaction_id": charge.transaction_id,
            "trade_type": charge.trade_type,
            "bank_type": "OTHERS",
            "success_time": rules.wire_time(charge.paid_at),
            "payer": {"openid": charge.openid},
            "amount": {
                "total": charge.total,
                "payer_total": charge.total,
                "currency": "CNY",
                "payer_currency": "CNY",
            },
        }

    def _refund(self, refund: Refund, charge: Charge) -> Wire:
        shown: Wire = {
            "refund_id": refund.refund_id,
            "out_refund_no": refund.out_refund_no,
            "transaction_id": charge.transaction_id,
            "out_trade_no": charge.out_trade_no,
            "channel": "ORIGINAL",
            "user_received_account": "支付用户零钱",
            "create_time": rules.wire_time(refund.created_at),
            "status": _wire_state(refund),
            "funds_account": "AVAILABLE",
            "promotion_detail": [],
            "amount": {
                "total": charge.total,
                "refund": refund.amount,
                "payer_total": charge.total,
                "payer_refund": refund.amount,
                "settlement_total": charge.total,
                "settlement_refund": refund.amount,
                "discount_refund": 0,
                "currency": "CNY",
                "from": [],
            },
        }
        if refund.succeeded_at is not None:
            shown["success_time"] = rules.wire_time(refund.succeeded_at)
        return shown

    def _refund_notice(self, refund: Refund, charge: Charge) -> Wire:
        """Like a refund, with its own spelling: `refund_status`, and amounts without a currency."""
        shown: Wire = {
            "mchid": self.identity.mchid,
            "transaction_id": charge.transaction_id,
            "out_trade_no": charge.out_trade_no,
            "refund_id": refund.refund_id,
            "out_refund_no": refund.out_refund_no,
            "refund_status": _wire_state(refund),
            "user_received_account": "支付用户零钱",
            "amount": {
                "total": charge.total,
                "refund": refund.amount,
                "payer_total": charge.total,
                "payer_refund": refund.amount,
            },
        }
        if refund.succeeded_at is not None:
            shown["success_time"] = rules.wire_time(refund.succeeded_at)
        return shown


def _what_the_payer_needs(kind: str, charge: Charge) -> Wire:
    if kind == "native":
        return {"code_url": charge.code_url}
    if kind == "h5":
        address = "https://wx.tenpay.com/cgi-bin/mmpayweb-bin/checkmweb"
        return {"h5_url": f"{address}?prepay_id={charge.prepay_id}&package={secrets.randbelow(10**10)}"}
    return {"prepay_id": charge.prepay_id}


def with_wrong_amount(shown: Wire) -> Wire:
    """The same answer with one unit too much in each amount: a planted mistake."""
    amount = {
        name: value + 1 if name in ("total", "payer_total", "refund", "payer_refund") else value
        for name, value in shown.get("amount", {}).items()
    }
    return {**shown, "amount": amount} if amount else shown


def _order_not_exist() -> rules.Refusal:
    return rules.Refusal(404, "ORDER_NOT_EXIST", "订单不存在")


def _wire_state(refund: Refund) -> str:
    return "CLOSED" if refund.state == "REVERSED" else refund.state


def _transaction_id(now: float) -> str:
    """28 digits."""
    return f"4200{_stamp(now)[:8]}{secrets.randbelow(10**16):016d}"


def _notice_id() -> str:
    digits = secrets.token_hex(16)
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y%m%d%H%M%S")
