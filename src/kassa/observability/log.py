"""Structured logs in which no key, token or personal field appears.

`logger(name)` may be used anywhere: what it is given is redacted before it reaches the standard library's logging, so
also when nobody configured anything. `configure_logging` says once per process where lines go and how they look, and
redacts what other libraries log.
"""

import logging
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MASK = "[redacted]"

_DEPTH_MAX = 8
"""Nested deeper than this is masked whole: nobody reads it, and it might hide something."""

_SECRET_NAME = re.compile(
    r"authorization|signature|secret|token|passw|passphrase|private|credential|cookie|openid|unionid|card|cvv|cvc"
    r"|pem|cipher|nonce|phone|mobile|email|real_?name|id_?number|bank_?account|iban|keys?$|apiv3|peer|client_?ip"
    r"|(?:^|[^a-z])(?:pan|pin|ip|sign|payer|dsn)(?:$|[^a-z])",
    re.IGNORECASE,
)
"""Names whose values are never shown. Too wide on purpose: a masked harmless field costs a look elsewhere."""

_SECRET_TEXT = re.compile(
    r"-----BEGIN [A-Z0-9 ]{1,40}-----.*?(?:-----END [A-Z0-9 ]{1,40}-----|\Z)"
    r"|\b(?:sk|whsec)_[A-Za-z0-9+/=_\-.]+"
    r"|(?i:authorization|cookie)[\"']?\s*[=:][^\r\n]*"
    r"|\bWECHATPAY2-[^\r\n]*"
    r"|\b(?i:bearer|basic)\s+[A-Za-z0-9+/=_\-.~]+"
    r"|(?i:secret|token|passw\w{0,8}|passphrase|private_?key|apiv3_?key|api_?key|openid|signature)"
    r"[\"']?\s{0,4}[=:]\s{0,4}[\"']?[^\s\"',;)}]+"
    r"|(?<=://)[^\s/@:]{0,128}:[^\s/@]{1,256}(?=@)",
    re.DOTALL,
)
"""What gives itself away in running text: our own prefixes, PEM, authorization, `name=value`, `user:password@`.

Every repeat that something must follow is bounded: a stranger's long text must not cost quadratic time."""

_CARD_NUMBER = re.compile(r"(?<![\w.])(?:[3-6]|2[2-7])(?:[ -]?\d){12,18}(?![\w.])")
"""First digits as cards have them (ISO/IEC 7812), so that times and order numbers that start with a year stay."""

_CHATTY = ("httpx", "httpcore", "asyncio", "aiohttp.access")
"""Others' loggers that tell every request; their warnings are enough."""


def redact_text(text: str) -> str:
    """The text without API keys, webhook secrets, PEM blocks, passwords in addresses and card numbers."""
    return _CARD_NUMBER.sub(_masked_card, _SECRET_TEXT.sub(MASK, text))


def redact(value: object, depth: int = 0) -> Any:
    """A copy in which every value under a name that smells of a secret is masked, and every text is cleaned."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth > _DEPTH_MAX:
        return MASK
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return redact_text(bytes(value).decode("utf-8", "replace"))
    if isinstance(value, Mapping):
        return {redact_text(str(name)): _redact_named(str(name), inner, depth) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(inner, depth + 1) for inner in value]
    # Anything else is shown as its text, which is cleaned like any other.
    return redact_text(str(value))


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose calls take an event (`noun.happened`) and fields by name; what they say is redacted."""
    bound = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, *_before_output(), _for_standard_logging()],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return cast(structlog.stdlib.BoundLogger, bound)


def configure_logging(
    style: Literal["json", "human"] = "human", level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Sends every log line of this process to `stream` (standard error), one JSON object or one sentence a line.

    May be repeated: the last call holds.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.name = "kassa"
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_output(style)],
            foreign_pre_chain=_before_output(),
        )
    )
    # Loggers made by structlog itself would write to standard output, with local variables: keys among them.
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_before_output(), _for_standard_logging()],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for known in [known for known in root.handlers if known.name == "kassa"]:
        root.removeHandler(known)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _before_output() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _write_traceback,
        _redact_event,
    ]


def _output(style: Literal["json", "human"]) -> list[Processor]:
    if style == "json":
        return [structlog.processors.JSONRenderer(sort_keys=False, ensure_ascii=False)]
    # The traceback is text already. The default renderer would show local variables: keys among them.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=plain)]


def _for_standard_logging() -> Processor:
    return structlog.stdlib.ProcessorFormatter.wrap_for_formatter


def _write_traceback(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Turns `exc_info` into text, without local variables."""
    given = event.pop("exc_info", None)
    if not given:
        return event
    if isinstance(given, BaseException):
        error: BaseException | None = given
    else:
        error = given[1] if isinstance(given, tuple) else sys.exc_info()[1]
    if error is not None:
        event["exception"] = "".join(traceback.format_exception(error)).rstrip()
    return event


def _redact_event(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Cleans what is said; what the formatter passes along for itself (names with an underscore) is never shown."""
    return {name: value if name.startswith("_") else _redact_named(name, value, 0) for name, value in event.items()}


def _redact_named(name: str, value: object, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    return MASK if _SECRET_NAME.search(name) else redact(value, depth + 1)


def _masked_card(found: re.Match[str]) -> str:
    """Luhn's check, ISO/IEC 7812-1, annex B: nine of ten numbers that are no cards stay."""
    digits = [int(digit) for digit in found.group() if digit.isdigit()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return MASK if (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 else found.group()
