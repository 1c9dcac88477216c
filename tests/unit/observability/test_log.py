"""No key, token or personal field ever appears in a log, whatever path it takes there."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import structlog

from kassa.errors import AuthInvalid
from kassa.observability.log import MASK, configure_logging, logger, redact, redact_text

PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----"
SECRETS = {
    "api_key": "sk_4eC39HqLyjWDarjtT1zdp7dc",
    "webhook": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "pem": PEM,
    "bearer": "Bearer abcdefSECRET",
    "wechat": 'WECHATPAY2-SHA256-RSA2048 mchid="1900",nonce_str="59SECRET",signature="uOVRSECRET"',
    "card": "4111 1111 1111 1111",
    "address": "postgresql://kassa:hunter2SECRET@db/kassa",
    "pair": "apiv3_key=SECRETSECRETSECRET",
    "json": '{"openid": "oSECRETopenid", "x": 1}',
}
TELLTALES = ("4eC39", "MfKQ9", "MIIEv", "SECRET", "4111 1111")

Style = Literal["json", "human"]


@contextmanager
def captured(style: Style) -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging(style, logging.DEBUG, stream)
    try:
        yield stream
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        structlog.contextvars.clear_contextvars()


def assert_clean(text: str) -> None:
    assert text.strip(), "nothing was logged at all"
    assert [telltale for telltale in TELLTALES if telltale in text] == []


@pytest.mark.parametrize("style", ["json", "human"])
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_in_a_value_is_masked_on_every_path(style: Style, secret: str) -> None:
    log = logger("kassa.test")
    other = logging.getLogger("another.library")

    with captured(style) as stream:
        structlog.contextvars.bind_contextvars(context=secret)
        log.info("payment.created", note=secret)
        log.info(f"the event itself {secret}")
        log.info("positional %s", secret)
        log.bind(bound=secret).warning("bound")
        log.info("nested", deep={"list": [{"tuple": (secret, secret.encode())}]}, names={secret: 1})
        log.info("object", error=AuthInvalid(given=secret))
        other.warning("theirs %s", secret)
        other.warning("theirs %(it)s", {"it": secret})
        try:
            raise ValueError(secret)
        except ValueError as error:
            log.exception("failed")
            log.error("failed", exc_info=error)
            other.exception("failed")

        assert_clean(stream.getvalue())


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "Authorization",
        "signature",
        "webhook-signature",
        "secret",
        "client_secret",
        "api_key",
        "apiv3Key",
        "key",
        "keys",
        "token",
        "private_key_pem",
        "openid",
        "payer",
        "payer_ip",
        "ip",
        "client_ip",
        "peer",
        "card_number",
        "cvv",
        "pan",
        "password",
        "email",
        "phone",
        "cookie",
        "nonce_str",
    ],
)
def test_a_name_that_smells_of_a_secret_masks_its_value(name: str) -> None:
    with captured("json") as stream:
        logger("kassa.test").info("something", **{name: "SECRET", "inside": {name: {"a": ["SECRET"]}}})

        line = json.loads(stream.getvalue())

    assert line[name] == MASK
    assert line["inside"][name] == MASK


def test_what_an_operator_needs_stays() -> None:
    fields = {
        "request_id": "req_1",
        "order_id": "20261123111305122",
        "payment": "pay_01932b00000070008000000000000000",
        "merchant": "mch_1",
        "number": "01932B000000700080000000",
        "amount": 100,
        "currency": "CNY",
        "state": "processing",
        "at": "2026-11-23T11:13:05.122Z",
        "milliseconds": "1795432385122",
        "url": "https://shop.example/hook?x=1",
        "description": "two coffees",
        "tip": 3,
    }

    assert redact(fields) == fields


def test_json_is_one_object_a_line_even_with_line_breaks_inside() -> None:
    with captured("json") as stream:
        logger("kassa.test").info("a\nb", text="c\r\nd")

        lines = stream.getvalue().splitlines()

    assert len(lines) == 1
    assert json.loads(lines[0])["text"] == "c\r\nd"


def test_a_traceback_shows_no_local_variables() -> None:
    def fails(harmless_name: str) -> None:
        raise RuntimeError("no")

    with captured("human") as stream:
        try:
            fails("SEC" + "RET")
        except RuntimeError:
            logger("kassa.test").exception("failed")

        assert_clean(stream.getvalue())


def test_nothing_needs_to_be_configured(caplog: pytest.LogCaptureFixture) -> None:
    logger("kassa.test").warning("early", api_key=SECRETS["api_key"], note=SECRETS["webhook"])

    assert_clean(caplog.text)


def test_configuring_twice_writes_once() -> None:
    with captured("json") as first:
        second = io.StringIO()
        configure_logging("json", logging.INFO, second)
        logger("kassa.test").info("once")

    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_what_is_too_deep_is_masked_whole() -> None:
    value: object = "SECRETless"
    for _ in range(50):
        value = [value]

    assert "SECRET" not in str(redact(value))


def test_redacting_a_long_text_takes_no_time() -> None:
    """No pattern may run away on what a stranger sends."""
    for text in (
        "a" * 100_000,
        "1 " * 50_000,
        "-----BEGIN A" * 5_000,
        "secret" * 20_000,
        "passw" * 20_000,
        "://" + "a:" * 50_000,
        "token" + " " * 90_000,
    ):
        redact_text(text)
