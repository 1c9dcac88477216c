"""WeChat Pay API v3 for one merchant: commands to signed requests, answers and callbacks to outcomes. Pure.

Facts are from the provider's documentation of API v3 as of 2026-11. What is not here: sending (`runner.py`), signatures
and ciphers (`wechat_crypto.py`), and whether an amount fits our own record (the payments service; outcomes carry it).
"""

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kassa.channels import wechat_crypto
from kassa.channels.channel import FreshKeys, KeySteps, Nonces
from kassa.channels.model import (
    Abnormal,
    ActionType,
    Advice,
    Charge,
    Closed,
    Evidence,
    Failed,
    Method,
    NextAction,
    Nonce,
    NotFound,
    Notice,
    NoticeKind,
    NotSent,
    Outcome,
    Pending,
    Refund,
    Request,
    Response,
    Steps,
    Succeeded,
    Unknown,
)
from kassa.channels.wechat_crypto import ClientKind
from kassa.clock import parse_rfc3339
from kassa.errors import (
    ChannelKeyUnknown,
    ChannelMessageInvalid,
    ChannelMismatch,
    RequestInvalid,
    SettingInvalid,
)

BASE_URL = "https://api.mch.weixin.qq.com"
CURRENCY = "CNY"
"""The domestic interface knows no other."""
AGE_MAX_S = 300
"""A signature's time may be so far from ours, either way; older messages may be replays."""
CALLBACK_BYTES_MAX = 65_536
"""A notification has about 1 500 bytes; more is refused before its signature is looked at."""
PROBE = "WECHATPAY/SIGNTEST/"
"""Signatures that begin so are sent now and then to see whether we check them. They must be refused."""
REFUNDS_MAX = 50
"""Refunds of one payment, at most."""
REFUND_GAP_S = 60
"""Between two refunds of one payment, at least."""

_CHINA = timezone(timedelta(hours=8))
"""The provider writes its times so."""
_SAFE_INTEGER_MAX = 9_007_199_254_740_991
_TIMESTAMP = re.compile(r"\d{1,11}", re.ASCII)

Read = TypeVar("Read")


# The account


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """A public key that the provider signs with, and when it may."""

    serial: str
    """PUB_KEY_ID_… for a bare key, which never expires; upper-case hexadecimal for a certificate's."""
    public_key: RSAPublicKey
    valid_from: datetime | None = None
    valid_until: datetime | None = None

    @property
    def is_bare(self) -> bool:
        """A bare public key, not from a certificate."""
        return self.valid_until is None

    def is_valid(self, now: datetime) -> bool:
        """Whether a signature made now may be by this key."""
        return (self.valid_from is None or self.valid_from <= now) and (
            self.valid_until is None or now <= self.valid_until
        )


@dataclass(frozen=True, slots=True)
class WeChatAccount:
    """A merchant's account at WeChat Pay. Holds secrets, which its text form does not show."""

    mchid: str
    appid: str
    merchant_serial_no: str
    """Serial of the merchant's certificate, hexadecimal."""
    private_key: RSAPrivateKey = field(repr=False)
    apiv3_key: bytes = field(repr=False)
    """32 bytes; opens what the provider encrypts for us."""
    base_url: str = BASE_URL
    platform_keys: Mapping[str, PlatformKey] = field(default_factory=dict, repr=False)
    """By serial. Several at once, of both kinds, are normal while the provider moves from one to another."""
    public_key_id: str | None = None
    """The bare key that answers shall be signed with; None: certificate mode, and the provider chooses."""


_CREDENTIALS = frozenset(
    {
        "base_url",
        "mchid",
        "appid",
        "merchant_serial_no",
        "merchant_private_key_pem",
        "apiv3_key",
        "platform_public_key_id",
        "platform_public_key_pem",
        "platform_certificate_serial",
        "platform_certificate_pem",
        "platform_keys",
    }
)
_REQUIRED = ("mchid", "appid", "merchant_serial_no", "merchant_private_key_pem", "apiv3_key")
SECRET_CREDENTIALS = frozenset({"merchant_private_key_pem", "apiv3_key"})


def read_account(credentials: Mapping[str, Any]) -> WeChatAccount:
    """The account that these credentials describe, checked.

    credentials: mchid, appid, merchant_serial_no, merchant_private_key_pem, apiv3_key; base_url if not the provider's;
    platform_public_key_id with platform_public_key_pem (public-key mode), platform_certificate_pem (certificate mode,
    may also be fetched), and platform_keys, {id: PEM}, for further ones of either kind while they rotate.
    Raises SettingInvalid, which names the field and never its value.
    """
    unknown = credentials.keys() - _CREDENTIALS
    if unknown:
        raise SettingInvalid("There is no such WeChat Pay credential.", names=", ".join(sorted(unknown)))
    for name, value in credentials.items():
        if name != "platform_keys" and not isinstance(value, str):
            raise SettingInvalid("A WeChat Pay credential must be text.", name=name)
    missing = [name for name in _REQUIRED if not credentials.get(name)]
    if missing:
        raise SettingInvalid("A WeChat Pay credential is missing.", names=", ".join(missing))
    return WeChatAccount(
        mchid=_matching(r"\d{6,32}", credentials, "mchid"),
        appid=_matching(r"\w{1,32}", credentials, "appid"),
        merchant_serial_no=_matching(r"[0-9A-Fa-f]{1,64}", credentials, "merchant_serial_no").upper(),
        private_key=wechat_crypto.load_private_key(credentials["merchant_private_key_pem"]),
        apiv3_key=_matching(r"[\x21-\x7e]{32}", credentials, "apiv3_key").encode(),
        base_url=_matching(r"https?://[^/?#@\s]+", {"base_url": BASE_URL} | dict(credentials), "base_url"),
        platform_keys=_read_platform_keys(credentials),
        public_key_id=credentials.get("platform_public_key_id") or None,
    )


def _matching(pattern: str, credentials: Mapping[str, Any], name: str) -> str:
    value: str = credentials[name]
    if re.fullmatch(pattern, value, re.ASCII) is None:
        raise SettingInvalid("A WeChat Pay credential has a wrong form.", name=name, form=pattern)
    return value


def _read_platform_keys(credentials: Mapping[str, Any]) -> dict[str, PlatformKey]:
    further = credentials.get("platform_keys", {})
    if not isinstance(further, Mapping):
        raise SettingInvalid("platform_keys must be an object of PEM texts by their id.", name="platform_keys")
    texts: dict[str, str] = {str(serial): str(pem) for serial, pem in further.items()}
    key_id, key_pem = credentials.get("platform_public_key_id"), credentials.get("platform_public_key_pem")
    if bool(key_id) != bool(key_pem):
        raise SettingInvalid("platform_public_key_id and platform_public_key_pem belong together.")
    if key_id and key_pem:
        texts[key_id] = key_pem
    if credentials.get("platform_certificate_pem"):
        texts[credentials.get("platform_certificate_serial") or ""] = credentials["platform_certificate_pem"]
    keys = [_read_platform_key(serial, pem) for serial, pem in texts.items()]
    return {key.serial: key for key in keys}


def _read_platform_key(serial: str, pem: str) -> PlatformKey:
    if "BEGIN CERTIFICATE" not in pem:
        return PlatformKey(serial.upper(), wechat_crypto.load_public_key(pem))
    key = _from_certificate(pem)
    if serial and serial.upper() != key.serial:
        raise SettingInvalid("A platform certificate has another serial than said.", said=serial, has=key.serial)
    return key


def _from_certificate(pem: str | bytes) -> PlatformKey:
    certificate = wechat_crypto.load_certificate(pem)
    return PlatformKey(certificate.serial_no, certificate.public_key, certificate.valid_from, certificate.valid_until)


# The wire: what is read of it. Everything else is ignored. Integers are integers: no float, no bool, no text.

_Fen = Annotated[int, msgspec.Meta(ge=1, le=_SAFE_INTEGER_MAX)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Problem(msgspec.Struct):
    code: str
    message: str = ""


class _Prepaid(msgspec.Struct):
    code_url: str | None = None
    prepay_id: str | None = None
    h5_url: str | None = None


class _Total(msgspec.Struct):
    total: _Fen
    currency: _Text


class _Payer(msgspec.Struct):
    openid: str | None = None


class _Trade(msgspec.Struct):
    """An order as query and notification show it."""

    appid: str
    mchid: str
    out_trade_no: str
    trade_state: str
    trade_state_desc: str | None = None
    transaction_id: str | None = None
    trade_type: str | None = None
    success_time: str | None = None
    attach: str | None = None
    amount: msgspec.Raw = msgspec.Raw()
    """Read when the order is paid; before, the provider may leave parts of it out."""
    payer: _Payer | None = None


class _RefundAmount(msgspec.Struct):
    refund: _Fen
    total: _Fen
    currency: str | None = None
    """A notification leaves it out; then it is not known, not assumed."""


class _RefundAnswer(msgspec.Struct):
    refund_id: _Text
    out_refund_no: str
    out_trade_no: str
    status: str
    amount: _RefundAmount
    success_time: str | None = None


class _RefundNotice(msgspec.Struct):
    mchid: str
    refund_id: _Text
    out_refund_no: str
    out_trade_no: str
    refund_status: str
    amount: _RefundAmount
    success_time: str | None = None


class _Encrypted(msgspec.Struct):
    algorithm: str
    ciphertext: str
    nonce: str
    associated_data: str | None = None


class _Envelope(msgspec.Struct):
    id: _Text
    event_type: str
    resource_type: str
    resource: _Encrypted


class _EncryptedCertificate(msgspec.Struct):
    serial_no: str
    encrypt_certificate: _Encrypted


class _Certificates(msgspec.Struct):
    data: list[_EncryptedCertificate]


# Refusals


class Refusal(Enum):
    """What an error code means, before it is asked which operation it answers."""

    DEFINITE = "definite"
    """This request was not and will not be carried out."""
    IN_DOUBT = "in_doubt"
    """Only a query can tell; every code that is not in the table is this."""
    CLOSED = "closed"
    MISSING = "missing"
    """Not there now."""
    PAYING = "paying"
    """The payer is about to pay."""
    NOT_TAKEN = "not_taken"
    """Back off, same number."""
    CREDENTIALS = "credentials"
    """Our signature is not accepted."""


REFUSALS: Mapping[str, Refusal] = {
    "USERPAYING": Refusal.PAYING,
    "PARAMERROR": Refusal.DEFINITE,
    "APPIDMCHIDNOTMATCH": Refusal.DEFINITE,
    "MCHNOTEXISTS": Refusal.DEFINITE,
    "NOAUTH": Refusal.DEFINITE,
    "RULELIMIT": Refusal.DEFINITE,
    "ACCOUNTERROR": Refusal.DEFINITE,
    "USERACCOUNTABNORMAL": Refusal.DEFINITE,
    # Also "same number, other parameters": then an order exists.
    "INVALIDREQUEST": Refusal.IN_DOUBT,
    "OUTTRADENOUSED": Refusal.IN_DOUBT,
    # The payment is a success; the query brings its amount and who paid.
    "ORDERPAID": Refusal.IN_DOUBT,
    "SYSTEMERROR": Refusal.IN_DOUBT,
    "BANKERROR": Refusal.IN_DOUBT,
    "ORDERCLOSED": Refusal.CLOSED,
    "ORDERNOTEXIST": Refusal.MISSING,
    "RESOURCENOTEXISTS": Refusal.MISSING,
    "REFUNDNOTEXIST": Refusal.MISSING,
    "SIGNERROR": Refusal.CREDENTIALS,
    # The merchant's own balance does not cover the refund: after a top-up the same number is to be sent again.
    "NOTENOUGH": Refusal.NOT_TAKEN,
    "FREQUENCYLIMITED": Refusal.NOT_TAKEN,
    "RATELIMITEXCEEDED": Refusal.NOT_TAKEN,
}
"""By code without `_`: the provider's spellings changed over the years."""


class _Operation(Enum):
    """The value is the source of its evidence."""

    CREATE = "create"
    QUERY = "query"
    CLOSE = "close"
    REFUND = "refund"
    REFUND_QUERY = "refund_query"
    KEYS = "keys"


_IS_ABOUT_CHARGE = frozenset({_Operation.CREATE, _Operation.QUERY, _Operation.CLOSE})
_ASKS = frozenset({_Operation.QUERY, _Operation.CLOSE, _Operation.REFUND_QUERY})


@dataclass(frozen=True, slots=True)
class _Signed:
    """A 2xx answer whose signature we checked."""

    body: bytes
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class _Refused:
    """A 202 or 4xx answer with a code; `evidence.authentic` says whether it was signed."""

    refusal: Refusal
    code: str
    reason: str
    evidence: Evidence
    key_is_unknown: bool


def _after_refusal(refused: _Refused, operation: _Operation, *, repeat: bool) -> Outcome:
    """What a refusal says about the money.

    An error body may come unsigned. Then it proves nothing but for one case: the first sending of a create, refused as
    a request. Should that have been a lie, nobody ever got what is needed to pay. A refund moves money by itself, so
    there only a signed refusal counts; and a query or close that is refused says nothing about what it asks for.
    """
    evidence, is_authentic = refused.evidence, refused.evidence.authentic
    match refused.refusal:
        case Refusal.NOT_TAKEN:
            return NotSent(evidence, refused.reason)
        case Refusal.PAYING if is_authentic and operation in _IS_ABOUT_CHARGE:
            return Pending(evidence)
        case Refusal.CLOSED if is_authentic and operation in _IS_ABOUT_CHARGE:
            return Closed(evidence)
        case Refusal.MISSING if is_authentic and operation in _ASKS:
            return NotFound(evidence)
        case Refusal.DEFINITE if operation is _Operation.CREATE and not repeat:
            return Failed(evidence, refused.code, refused.reason)
        case Refusal.DEFINITE if operation is _Operation.REFUND and not repeat and is_authentic:
            return Failed(evidence, refused.code, refused.reason)
        case Refusal.DEFINITE | Refusal.CREDENTIALS:
            return Unknown(evidence, refused.reason, Advice.OPERATOR)
    return Unknown(evidence, refused.reason, Advice.REFRESH_KEYS if refused.key_is_unknown else Advice.QUERY)


# The channel


class WeChatPay:
    """Charges, Refunds, Callbacks and KeyRefresh for one account. Immutable: tasks and threads may share it."""

    __slots__ = ("_cipher", "account")

    def __init__(self, account: WeChatAccount) -> None:
        self.account = account
        self._cipher = AESGCM(account.apiv3_key)

    # Charges

    def charge(self, command: Charge, nonces: Nonces) -> Steps:
        """Order a payment: Pending with what the payer needs. Identical commands give identical bodies."""
        fault = _charge_fault(command)
        if fault is not None:
            return _refuse_here(_Operation.CREATE, fault, repeat=command.repeat)
        return self._charge(command, nonces)

    def _charge(self, command: Charge, nonces: Nonces) -> Steps:
        path = f"/v3/pay/transactions/{command.method.value}"
        answer = yield from self._ask(_Operation.CREATE, "POST", path, self._charge_body(command), nonces)
        if isinstance(answer, _Refused):
            return _after_refusal(answer, _Operation.CREATE, repeat=command.repeat)
        if not isinstance(answer, _Signed):
            return answer
        prepaid = _decode(answer.body, _Prepaid)
        action = None if prepaid is None else self._next_action(command, prepaid, nonces)
        if action is None:
            return Unknown(answer.evidence, "the answer does not hold what the payer needs")
        return Pending(answer.evidence, action)

    def query(self, number: str, nonces: Nonces) -> Steps:
        """What became of the charge with this number of ours."""
        answer = yield from self._query(f"out-trade-no/{quote(number, safe='')}", nonces)
        return self._read_trade(answer, number=number)

    def query_by_channel_id(self, channel_id: str, nonces: Nonces) -> Steps:
        """What became of the charge with this transaction_id of theirs."""
        answer = yield from self._query(f"id/{quote(channel_id, safe='')}", nonces)
        return self._read_trade(answer, channel_id=channel_id)

    def _query(self, name: str, nonces: Nonces) -> Generator[Request, Response, "_Answer"]:
        path = f"/v3/pay/transactions/{name}?mchid={self.account.mchid}"
        return (yield from self._ask(_Operation.QUERY, "GET", path, b"", nonces))

    def close(self, number: str, nonces: Nonces) -> Steps:
        """Close an order that is not paid. May be repeated. A paid one gives Unknown: the query tells the amount."""
        path = f"/v3/pay/transactions/out-trade-no/{quote(number, safe='')}/close"
        body = msgspec.json.encode({"mchid": self.account.mchid})
        answer = yield from self._ask(_Operation.CLOSE, "POST", path, body, nonces)
        if isinstance(answer, _Refused):
            return _after_refusal(answer, _Operation.CLOSE, repeat=False)
        if not isinstance(answer, _Signed):
            return answer
        if answer.body or answer.evidence.status != 204:
            # An empty body names no order, so at least nothing else that was once signed can pass for it.
            return Unknown(answer.evidence, "the answer to a close is not an empty one")
        return Closed(answer.evidence)

    # Refunds

    def refund(self, command: Refund, nonces: Nonces) -> Steps:
        """Give money back. 2xx is acceptance; the status in it says whether it is done."""
        fault = _refund_fault(command)
        if fault is not None:
            return _refuse_here(_Operation.REFUND, fault, repeat=command.repeat)
        return self._refund(command, nonces)

    def _refund(self, command: Refund, nonces: Nonces) -> Steps:
        body = msgspec.json.encode(
            {
                "out_trade_no": command.charge_number,
                "out_refund_no": command.number,
                **({"reason": command.reason[:80]} if command.reason else {}),
                "notify_url": command.notify_url,
                "amount": {"refund": command.amount, "total": command.charge_amount, "currency": command.currency},
            }
        )
        answer = yield from self._ask(_Operation.REFUND, "POST", "/v3/refund/domestic/refunds", body, nonces)
        if isinstance(answer, _Refused):
            return _after_refusal(answer, _Operation.REFUND, repeat=command.repeat)
        return self._read_refund(answer, number=command.number, charge_number=command.charge_number)

    def query_refund(self, number: str, nonces: Nonces) -> Steps:
        """What became of the refund with this number of ours."""
        path = f"/v3/refund/domestic/refunds/{quote(number, safe='')}"
        answer = yield from self._ask(_Operation.REFUND_QUERY, "GET", path, b"", nonces)
        if isinstance(answer, _Refused):
            return _after_refusal(answer, _Operation.REFUND_QUERY, repeat=False)
        return self._read_refund(answer, number=number, charge_number=None)

    # Callbacks

    def read_callback(self, headers: Mapping[str, str], body: bytes, *, now: datetime) -> Notice:
        """What a notification says, once size, age, key and signature are checked and it is opened.

        body: the raw bytes as received. `id` of the notice is the same when the provider repeats itself.
        Raises ChannelMessageInvalid (ChannelKeyUnknown for a key that we do not have), then ChannelMismatch for another
        account's message.
        """
        if len(body) > CALLBACK_BYTES_MAX:
            raise ChannelMessageInvalid("The notification is too large.")
        self._verify(_lower(headers), body, now, self.account.platform_keys)
        envelope = _decode(body, _Envelope)
        if envelope is None or envelope.resource_type != "encrypt-resource":
            raise ChannelMessageInvalid("The notification is not readable.")
        plain = self._open(envelope.resource)
        kind, _, _ = envelope.event_type.partition(".")
        if kind == "TRANSACTION":
            return self._read_trade_notice(envelope, plain)
        if kind == "REFUND":
            return self._read_refund_notice(envelope, plain)
        raise ChannelMessageInvalid("The notification is of a kind that nobody asked for.", event=envelope.event_type)

    def callback_accepted(self) -> tuple[int, Mapping[str, str], bytes]:
        """204 without a body: the provider will not send it again."""
        return 204, {}, b""

    def callback_refused(self, reason: str, *, status: int = 500) -> tuple[int, Mapping[str, str], bytes]:
        """The provider sends it again, up to 15 times in a day."""
        headers = {"Content-Type": "application/json; charset=utf-8"}
        return status, headers, msgspec.json.encode({"code": "FAIL", "message": reason})

    # Keys

    def fetch_keys(self, nonces: Nonces) -> KeySteps:
        """The platform certificates that are in use now, old and new ones while the provider changes over.

        The list replaces the certificates that we had; bare public keys stay, they cannot be fetched. An empty list is
        what accounts in public-key mode get, and changes nothing. The first list cannot be verified with a key that we
        have: then trust comes from the API v3 key, which alone opens the certificates.
        """
        request, now = self._request("GET", "/v3/certificates", b"", nonces)
        response = yield request
        evidence = Evidence(_Operation.KEYS.value, authentic=False, status=response.status)
        if response.status != 200:
            answer = self._judge(_Operation.KEYS, response, now)
            if isinstance(answer, _Refused):
                return _after_refusal(answer, _Operation.KEYS, repeat=False)
            return Unknown(evidence, "the keys were not given") if isinstance(answer, _Signed) else answer
        try:
            fetched = self._open_certificates(response.body)
            self._verify(_lower(response.headers), response.body, now, {**self.account.platform_keys, **fetched})
        except (ChannelMessageInvalid, SettingInvalid) as error:
            return Unknown(evidence, error.detail)
        bare = {serial: key for serial, key in self.account.platform_keys.items() if key.is_bare}
        keys = {**bare, **fetched} if fetched else self.account.platform_keys
        return FreshKeys(WeChatPay(replace(self.account, platform_keys=keys)), tuple(sorted(keys)))

    def _open_certificates(self, body: bytes) -> dict[str, PlatformKey]:
        listed = _decode(body, _Certificates)
        if listed is None:
            raise ChannelMessageInvalid("The list of certificates is not readable.")
        keys = [_from_certificate(self._open(item.encrypt_certificate)) for item in listed.data]
        if [key.serial for key in keys] != [item.serial_no.upper() for item in listed.data]:
            raise ChannelMessageInvalid("A certificate has another serial than the list says.")
        return {key.serial: key for key in keys}

    # Requests

    def _request(self, method: str, path: str, body: bytes, nonces: Nonces) -> tuple[Request, datetime]:
        """A signed request, and the time at which it was signed."""
        account, nonce = self.account, nonces()
        timestamp = int(nonce.now.timestamp())
        text = wechat_crypto.request_text(method, path, timestamp, nonce.token, body)
        headers = {
            "Accept": "application/json",
            "Authorization": wechat_crypto.authorization(
                mchid=account.mchid,
                serial_no=account.merchant_serial_no,
                timestamp=timestamp,
                nonce=nonce.token,
                signature=wechat_crypto.sign(account.private_key, text),
            ),
        }
        if body:
            headers["Content-Type"] = "application/json"
        if account.public_key_id is not None:
            headers["Wechatpay-Serial"] = account.public_key_id
        return Request(method, path, headers, body), nonce.now

    def _ask(
        self, operation: _Operation, method: str, path: str, body: bytes, nonces: Nonces
    ) -> Generator[Request, Response, "_Answer"]:
        request, now = self._request(method, path, body, nonces)
        response = yield request
        return self._judge(operation, response, now)

    def _charge_body(self, command: Charge) -> bytes:
        body: dict[str, Any] = {
            "appid": self.account.appid,
            "mchid": self.account.mchid,
            "description": command.description[:127],
            "out_trade_no": command.number,
            "time_expire": command.expires_at.astimezone(_CHINA).isoformat(timespec="seconds"),
        }
        if command.attach is not None:
            body["attach"] = command.attach
        body["notify_url"] = command.notify_url
        body["amount"] = {"total": command.amount, "currency": command.currency}
        if command.method is Method.JSAPI:
            body["payer"] = {"openid": command.openid}
        if command.method is Method.H5:
            body["scene_info"] = {"payer_client_ip": command.payer_ip, "h5_info": {"type": "Wap"}}
        return msgspec.json.encode(body)

    def _next_action(self, command: Charge, prepaid: _Prepaid, nonces: Nonces) -> NextAction | None:
        match command.method:
            case Method.NATIVE if prepaid.code_url:
                return NextAction(ActionType.QR_CODE, {"code_url": prepaid.code_url})
            case Method.H5 if prepaid.h5_url:
                back = f"&redirect_url={quote(command.return_url, safe='')}" if command.return_url else ""
                return NextAction(ActionType.REDIRECT, {"url": prepaid.h5_url + back})
            case Method.JSAPI if prepaid.prepay_id:
                return NextAction(ActionType.JSAPI, {"params": self._jsapi_params(prepaid.prepay_id, nonces())})
            case Method.APP if prepaid.prepay_id:
                return NextAction(ActionType.APP, {"params": self._app_params(prepaid.prepay_id, nonces())})
        return None

    def _jsapi_params(self, prepay_id: str, nonce: Nonce) -> dict[str, str]:
        """What `wx.requestPayment` and WeixinJSBridge take."""
        timestamp = str(int(nonce.now.timestamp()))
        return {
            "appId": self.account.appid,
            "timeStamp": timestamp,
            "nonceStr": nonce.token,
            "package": f"prepay_id={prepay_id}",
            "signType": "RSA",
            "paySign": self._pay_sign(ClientKind.JSAPI, timestamp, nonce.token, prepay_id),
        }

    def _app_params(self, prepay_id: str, nonce: Nonce) -> dict[str, str]:
        """What the open SDK's PayReq takes."""
        timestamp = str(int(nonce.now.timestamp()))
        return {
            "appid": self.account.appid,
            "partnerid": self.account.mchid,
            "prepayid": prepay_id,
            "package": "Sign=WXPay",
            "noncestr": nonce.token,
            "timestamp": timestamp,
            "sign": self._pay_sign(ClientKind.APP, timestamp, nonce.token, prepay_id),
        }

    def _pay_sign(self, kind: ClientKind, timestamp: str, nonce: str, prepay_id: str) -> str:
        return wechat_crypto.pay_sign(
            self.account.private_key,
            kind,
            appid=self.account.appid,
            timestamp=timestamp,
            nonce=nonce,
            prepay_id=prepay_id,
        )

    # Answers

    def _judge(self, operation: _Operation, response: Response, now: datetime) -> "_Answer":
        """A signed 2xx, a refusal with its code, or a doubt: everything else.

        5xx is a doubt whatever code it carries, and so is a 2xx that we cannot verify.
        """
        evidence = Evidence(operation.value, authentic=False, status=response.status)
        key_is_unknown = False
        try:
            self._verify(_lower(response.headers), response.body, now, self.account.platform_keys)
            evidence = replace(evidence, authentic=True)
            doubt = None
        except ChannelMessageInvalid as error:
            key_is_unknown = isinstance(error, ChannelKeyUnknown)
            doubt = Unknown(evidence, error.detail, Advice.REFRESH_KEYS if key_is_unknown else Advice.QUERY)
        if response.status in (200, 201, 204):
            return doubt or _Signed(response.body, evidence)
        problem = _decode(response.body, _Problem)
        if problem is not None:
            evidence = replace(evidence, code=problem.code[:64], text=_for_people(problem.message))
        if response.status == 429 and problem is None:
            return NotSent(evidence, "HTTP 429")
        if problem is None or not (response.status == 202 or 400 <= response.status < 500):
            return Unknown(evidence, f"HTTP {response.status}")
        refusal = REFUSALS.get(problem.code.replace("_", ""), Refusal.IN_DOUBT)
        reason = f"{problem.code[:64]}: {_for_people(problem.message)}"
        return _Refused(refusal, problem.code[:64], reason, evidence, key_is_unknown)

    def _verify(self, headers: Mapping[str, str], body: bytes, now: datetime, keys: Mapping[str, PlatformKey]) -> None:
        """Checks age, key and signature of an answer or notification. Raises ChannelMessageInvalid.

        The cheap checks come first, so that a forger costs us little.
        """
        timestamp = headers.get("wechatpay-timestamp", "")
        nonce = headers.get("wechatpay-nonce", "")
        signature = headers.get("wechatpay-signature", "")
        serial = headers.get("wechatpay-serial", "").upper()
        if not (timestamp and nonce and signature and serial):
            raise ChannelMessageInvalid("The message is not signed.")
        if signature.startswith(PROBE):
            raise ChannelMessageInvalid("The message is a probe of our checks.")
        if headers.get("wechatpay-signature-type", wechat_crypto.SCHEME) != wechat_crypto.SCHEME:
            raise ChannelMessageInvalid("The message has a signature of another type.")
        if _TIMESTAMP.fullmatch(timestamp) is None or not nonce.isascii():
            raise ChannelMessageInvalid("The message has a signature of a wrong form.")
        if abs(now.timestamp() - int(timestamp)) > AGE_MAX_S:
            raise ChannelMessageInvalid("The message's time is too far from ours.")
        key = keys.get(serial)
        if key is None or not key.is_valid(now):
            raise ChannelKeyUnknown(serial=serial[:64] if serial.isascii() else "not ASCII")
        if not wechat_crypto.verify(key.public_key, wechat_crypto.response_text(timestamp, nonce, body), signature):
            raise ChannelMessageInvalid("The message's signature is wrong.")

    def _open(self, resource: _Encrypted) -> bytes:
        if resource.algorithm != wechat_crypto.ALGORITHM:
            raise ChannelMessageInvalid("The message is encrypted in a way that we do not know.")
        return wechat_crypto.decrypt_resource(
            self._cipher,
            nonce=resource.nonce,
            associated_data=resource.associated_data or "",
            ciphertext=resource.ciphertext,
        )

    def _read_trade(self, answer: "_Answer", *, number: str | None = None, channel_id: str | None = None) -> Outcome:
        if isinstance(answer, _Refused):
            return _after_refusal(answer, _Operation.QUERY, repeat=False)
        if not isinstance(answer, _Signed):
            return answer
        trade = _decode(answer.body, _Trade)
        if trade is None:
            return Unknown(answer.evidence, "the answer is not readable")
        if not self._is_ours(trade) or number not in (None, trade.out_trade_no):
            return Unknown(answer.evidence, "the answer is about another account or order")
        if channel_id not in (None, trade.transaction_id):
            return Unknown(answer.evidence, "the answer is about another order")
        return _trade_outcome(trade, answer.evidence)

    def _is_ours(self, trade: _Trade) -> bool:
        return trade.mchid == self.account.mchid and trade.appid == self.account.appid

    def _read_refund(self, answer: "_Signed | Unknown | NotSent", *, number: str, charge_number: str | None) -> Outcome:
        if not isinstance(answer, _Signed):
            return answer
        refund = _decode(answer.body, _RefundAnswer)
        if refund is None:
            return Unknown(answer.evidence, "the answer is not readable")
        if refund.out_refund_no != number or charge_number not in (None, refund.out_trade_no):
            return Unknown(answer.evidence, "the answer is about another refund")
        return _refund_outcome(refund, refund.status, answer.evidence)

    def _read_trade_notice(self, envelope: _Envelope, plain: bytes) -> Notice:
        trade = _decode(plain, _Trade)
        if trade is None:
            raise ChannelMessageInvalid("The notification's order is not readable.")
        if not self._is_ours(trade):
            raise ChannelMismatch("A notification is meant for another account.", mchid=trade.mchid, appid=trade.appid)
        outcome = _trade_outcome(trade, Evidence("callback", authentic=True, code=trade.trade_state))
        if isinstance(outcome, Unknown):
            raise ChannelMessageInvalid("The notification's order is not readable.", reason=outcome.reason)
        facts = {
            "event_type": envelope.event_type,
            "trade_state": trade.trade_state,
            "trade_type": trade.trade_type,
            "transaction_id": trade.transaction_id,
        }
        return Notice(
            envelope.id, NoticeKind.CHARGE, trade.out_trade_no, outcome, attach=trade.attach or None, facts=facts
        )

    def _read_refund_notice(self, envelope: _Envelope, plain: bytes) -> Notice:
        refund = _decode(plain, _RefundNotice)
        if refund is None:
            raise ChannelMessageInvalid("The notification's refund is not readable.")
        if refund.mchid != self.account.mchid:
            raise ChannelMismatch("A notification is meant for another account.", mchid=refund.mchid)
        evidence = Evidence("callback", authentic=True, code=refund.refund_status)
        outcome = _refund_outcome(refund, refund.refund_status, evidence)
        if isinstance(outcome, Unknown):
            raise ChannelMessageInvalid("The notification's refund is not readable.", reason=outcome.reason)
        facts = {
            "event_type": envelope.event_type,
            "refund_status": refund.refund_status,
            "refund_id": refund.refund_id,
            "refund": refund.amount.refund,
            "total": refund.amount.total,
        }
        return Notice(
            envelope.id,
            NoticeKind.REFUND,
            refund.out_refund_no,
            outcome,
            charge_number=refund.out_trade_no,
            facts=facts,
        )


_Answer = _Signed | _Refused | Unknown | NotSent


# States


def _trade_outcome(trade: _Trade, evidence: Evidence) -> Outcome:
    """What an order's state means. REFUND is paid with some refund, of whatever size: the money did come."""
    evidence = _with_code(evidence, trade.trade_state)
    match trade.trade_state:
        case "SUCCESS" | "REFUND":
            return _paid(trade, evidence)
        case "NOTPAY" | "USERPAYING" | "ACCEPT":
            return Pending(evidence, channel_id=trade.transaction_id or None)
        case "CLOSED" | "REVOKED":
            return Closed(evidence)
        case "PAYERROR":
            return Failed(evidence, "PAYERROR", _for_people(trade.trade_state_desc or "the payment failed"))
    return Unknown(evidence, "the order is in a state that we do not know")


def _with_code(evidence: Evidence, code: str) -> Evidence:
    return evidence if evidence.code == code else replace(evidence, code=code)


def _paid(trade: _Trade, evidence: Evidence) -> Outcome:
    amount = _decode(bytes(trade.amount), _Total)
    at = _read_time(trade.success_time)
    if amount is None or at is None or not trade.transaction_id:
        return Unknown(evidence, "the order is paid, but its amount, time or number is not readable")
    payer = trade.payer.openid if trade.payer is not None else None
    return Succeeded(evidence, trade.transaction_id, amount.total, amount.currency, at, payer or None)


def _refund_outcome(refund: _RefundAnswer | _RefundNotice, status: str, evidence: Evidence) -> Outcome:
    """What a refund's state means. Its amount is what the payer gets back of the order's."""
    evidence = _with_code(evidence, status)
    match status:
        case "SUCCESS":
            at = _read_time(refund.success_time)
            return Succeeded(evidence, refund.refund_id, refund.amount.refund, refund.amount.currency, at)
        case "PROCESSING":
            return Pending(evidence, channel_id=refund.refund_id)
        case "CLOSED":
            return Failed(evidence, "CLOSED", "the channel closed the refund")
        case "ABNORMAL":
            return Abnormal(evidence, refund.refund_id)
    return Unknown(evidence, "the refund is in a state that we do not know")


def _read_time(text: str | None) -> datetime | None:
    """In UTC; None when it is missing or not readable."""
    try:
        return parse_rfc3339(text) if text else None
    except RequestInvalid:
        return None


# Local refusals: definite, since nothing was sent.

_NUMBER = re.compile(r"[0-9A-Za-z]{20,32}", re.ASCII)


def _refuse_here(operation: _Operation, fault: str, *, repeat: bool) -> Steps:
    evidence = Evidence(operation.value, authentic=False, text="refused before sending")
    if repeat:
        return Unknown(evidence, fault, Advice.OPERATOR)
    return Failed(evidence, "request.invalid", fault)
    yield  # Makes this a conversation, of no requests.


def _charge_fault(command: Charge) -> str | None:
    if _NUMBER.fullmatch(command.number) is None:
        return "the number must be 20 to 32 letters and digits"
    if not _is_amount(command.amount) or command.currency != CURRENCY:
        return "the amount must be a positive whole number of fen, CNY"
    if not command.description:
        return "a description is needed"
    if command.expires_at.tzinfo is None:
        return "the expiry must have a time zone"
    if command.attach is not None and len(command.attach) > 128:
        return "attach is longer than 128"
    if command.method is Method.JSAPI and not command.openid:
        return "JSAPI needs the payer's openid"
    if command.method is Method.H5 and not command.payer_ip:
        return "H5 needs the payer's IP address"
    return _notify_url_fault(command.notify_url)


def _refund_fault(command: Refund) -> str | None:
    if _NUMBER.fullmatch(command.number) is None or _NUMBER.fullmatch(command.charge_number) is None:
        return "the numbers must be 20 to 32 letters and digits"
    if not (_is_amount(command.amount) and _is_amount(command.charge_amount)) or command.currency != CURRENCY:
        return "the amounts must be positive whole numbers of fen, CNY"
    if command.amount > command.charge_amount:
        return "the refund is larger than the charge"
    return _notify_url_fault(command.notify_url)


def _is_amount(amount: int) -> bool:
    return type(amount) is int and 1 <= amount <= _SAFE_INTEGER_MAX


def _notify_url_fault(url: str) -> str | None:
    if re.fullmatch(r"https?://[^?#\s]{1,240}", url) is None:
        return "the notify_url must be http(s) without a query, at most 248 characters"
    return None


# Small readers


def _decode(body: bytes, kind: type[Read]) -> Read | None:
    """None when the body is not JSON of this shape, or holds a NUL, which no row could keep."""
    if b"\\u0000" in body:
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


_LONG_WORD = re.compile(r"[0-9A-Za-z_\-+/=]{16,}")


def _for_people(message: str) -> str:
    """The provider's sentence, shortened; long words are left out, for they may be somebody's openid or a signature."""
    return _LONG_WORD.sub("…", message[:256])
