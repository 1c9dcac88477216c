"""Every setting of Kassa: one frozen `Settings`, read once. Nothing else reads the environment.

A value comes from a flag, else from the environment (`KASSA_` and the name in capitals), else from `kassa.toml` in the
directory, else from its default. `load` says for each where it came from, so that `kassa doctor` can show it.
"""

import base64
import binascii
import os
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import msgspec

from kassa.errors import SettingInvalid

FILE_NAME = "kassa.toml"
KEY_BYTES = 32
"""AES-256 takes 32 bytes."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be set. Each field says its unit and why one would change it."""

    dir: str = ".kassa"
    """Directory of what this installation keeps beside the database: kassa.toml, key files, the embedded PostgreSQL."""
    database_url: str | None = None
    """postgresql://…; none: the embedded PostgreSQL of `dir`."""
    host: str = "127.0.0.1"
    """Address that the API listens on. Behind a reverse proxy on another machine: 0.0.0.0."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    """TCP port of the API; 0 takes a free one."""
    public_url: str | None = None
    """Where providers reach us for callbacks; none: http://host:port, good for a local sandbox only."""
    secrets_key: str | None = None
    """Key of what is encrypted at rest: 32 bytes as base64 or hex. Better not in kassa.toml."""
    secrets_key_file: str = "secrets.key"
    """File with that key, used when `secrets_key` is not given; relative to `dir`. Lost, credentials are lost."""
    anchor_key_file: str = "anchor.key"
    """Private key that signs the anchors of the chain, relative to `dir`, so outside the database."""
    webhook_allow_private: bool = False
    """Whether webhooks may go to loopback and private addresses. For trying things out only: SSRF."""
    idempotency_keep_days: Annotated[int, msgspec.Meta(ge=7, le=3650)] = 8
    """Days for which answers are kept under their Idempotency-Key; a day more than promised."""
    idempotency_wait_s: Annotated[float, msgspec.Meta(ge=0, le=30)] = 2.0
    """Seconds that a repeat waits for the first request of its key before it is told 409."""
    channel_wait_s: Annotated[float, msgspec.Meta(ge=0, le=30)] = 10.0
    """Seconds that a request waits for the channel's first answer; then the attempt is shown as it stands."""
    journal_queue_max: Annotated[int, msgspec.Meta(ge=1)] = 8192
    """Changes that may wait for the journal; past it the API answers 503 at once, so nobody times out."""
    journal_batch_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 512
    """Changes in one database commit. More saves a little; the slowest waits longer."""
    journal_lanes: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """Connections that write batches side by side. Each has a writer slot of its own."""
    pool_min: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Database connections for reading that are kept open."""
    pool_max: Annotated[int, msgspec.Meta(ge=1)] = 10
    """Database connections for reading at most; the journal has one of its own beside them."""
    body_bytes_max: Annotated[int, msgspec.Meta(ge=1024)] = 65536
    """Largest request body in bytes. A full metadata object needs about 30 000."""
    connections_max: Annotated[int, msgspec.Meta(ge=1)] = 4096
    """Open HTTP connections at most."""
    merchant_requests_max: Annotated[int, msgspec.Meta(ge=1)] = 1024
    """Requests of one merchant that are under way at once in one process; past it they are answered 429. Far more than a
    shop has, far less than the journal takes, so that one merchant that floods us leaves room for the others."""
    key_requests_per_s_max: Annotated[float, msgspec.Meta(gt=0)] = 20_000.0
    """Requests a second of one API key in one process, with two seconds' worth at once; past it 429. The default only stops
    a loop that runs wild on a big machine; set it to what a merchant has agreed to."""
    stop_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """Seconds that requests which are running get to finish when Kassa is told to stop."""
    brokers: tuple[str, ...] = ()
    """Message brokers: `amqp://…`, `kafka://…`, `postgres` …, each with its topics after a `#` (`URL#topic,topic`); one
    without takes all of ours that no other one names. In the environment separated by spaces or commas."""
    broker_topology: Literal["create", "verify"] = "create"
    """Whether queues and topics that are missing are made, or only looked for, where Kassa has no right to make them."""
    relay_backlog_per_s: Annotated[int, msgspec.Meta(ge=0)] = 5000
    """Events a second of a backlog that a relay sends to a broker's topic while payments are made, so that those have the machine;
    twice of what is written, where that is more. When nobody has written for a second, it goes as fast as it can. 0: always so."""
    order_queue: Literal["plain", "durable", "passive"] | None = None
    """How RabbitMQ's queue payment_order is declared; whoever else declares it must do the same. None: `durable`, and `plain`
    (what the simplest programs do) under `kassa up`."""
    order_merchant: str | None = None
    """mch_…: whose payments the queue payment_order makes. None: the only merchant; `kassa up` takes its own. Who may write to
    the queue is the broker's affair."""
    order_currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")] = "CNY"
    """Of a request in payment_order that names no currency."""
    order_channel: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")] = "wechat"
    """Of a request in payment_order that names no channel."""
    order_method: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")] = "native"
    """Of a request in payment_order that names neither method nor channel."""
    log_level: str = "info"
    """debug, info, warning or error."""

    @property
    def base_url(self) -> str:
        """Where providers reach us, without a slash at the end."""
        return (self.public_url or f"http://{self.host}:{self.port}").rstrip("/")

    def path(self, name: str) -> Path:
        """A file that is given relative to `dir`."""
        return Path(self.dir) / name


SECRET_FIELDS = frozenset({"secrets_key"})
URL_FIELDS = frozenset({"database_url", "public_url"})
_BROKERS = "brokers"


class Origin(NamedTuple):
    """One effective setting, for people: secrets are masked."""

    name: str
    shown: str
    source: str
    """flag, environment KASSA_…, the path of kassa.toml, or default."""


class Loaded(NamedTuple):
    """The settings, and where each came from."""

    settings: Settings
    origins: tuple[Origin, ...]


def load(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, *, directory: str | None = None
) -> Loaded:
    """Settings from flags, then environment, then kassa.toml. A flag that is None counts as not given.

    Raises SettingInvalid, which names the setting and its source.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    if directory is not None:
        given["dir"] = directory
    folder = str(given.get("dir") or environ.get("KASSA_DIR") or Settings().dir)
    file = Path(folder) / FILE_NAME
    written = _read_file(file)
    values: dict[str, Any] = {}
    origins: list[Origin] = []
    for name, kind in _kinds().items():
        value, source = _choose(name, given, environ, written, file)
        values[name] = _default(name, folder) if source is None else _convert(name, value, kind, source)
        origins.append(Origin(name, masked(name, values[name]), source or "default"))
    settings = Settings(**values)
    if settings.pool_min > settings.pool_max:
        raise SettingInvalid("pool_min is larger than pool_max.", name="pool_min")
    return Loaded(settings, tuple(origins))


_DEFAULTS = Settings()


def _default(name: str, folder: str) -> Any:
    return folder if name == "dir" else getattr(_DEFAULTS, name)


def _kinds() -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(Settings)}


def _choose(
    name: str, flags: Mapping[str, Any], environ: Mapping[str, str], written: Mapping[str, Any], file: Path
) -> tuple[Any, str | None]:
    if name in flags:
        return flags[name], f"flag --{name.replace('_', '-')}"
    variable = f"KASSA_{name.upper()}"
    if variable in environ:
        return environ[variable], f"environment {variable}"
    if name in written:
        return written[name], str(file)
    return None, None


def _convert(name: str, value: Any, kind: Any, source: str) -> Any:
    if name == _BROKERS and isinstance(value, str):
        value = split_brokers(value)
    try:
        # Not strict: the environment has only strings, so "8080" and "true" must do.
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingInvalid(
            f"The setting {name} from {source} is not valid: {error}.", name=name, source=source
        ) from None


def split_brokers(text: str) -> list[str]:
    """Brokers of one line, separated by spaces or commas. A comma inside of a URL (host:port,host:port) or behind its `#`
    (topic,topic) belongs to it."""
    found: list[str] = []
    for word in text.split():
        is_topics = False
        for part in filter(None, word.split(",")):
            if found and "://" not in part and (is_topics or ":" in part):
                found[-1] += f",{part}"
            else:
                found.append(part)
            is_topics = "#" in found[-1]
    return found


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise SettingInvalid(f"{file} cannot be read: {error.strerror}.", source=str(file)) from error
    try:
        written = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingInvalid(f"{file} is not TOML: {error}.", source=str(file)) from error
    unknown = sorted(set(written) - set(_kinds()))
    if unknown:
        raise SettingInvalid(f"{file} has settings that do not exist: {', '.join(unknown)}.", source=str(file))
    return written


def masked(name: str, value: Any) -> str:
    """A setting as people may see it: no key, no password."""
    if value is None:
        return "not set"
    if name in SECRET_FIELDS:
        return "(set)"
    if name in URL_FIELDS:
        return without_password(str(value))
    if name == _BROKERS:
        return _masked_list(value) or "none"
    return str(value)


def _masked_list(urls: Sequence[str]) -> str:
    return " ".join(without_password(url) + (f"#{urlsplit(url).fragment}" if "#" in url else "") for url in urls)


def without_password(url: str) -> str:
    """A URL with its password, and everything in its query, replaced by stars."""
    parts = urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    if ":" in user:
        user = user.split(":", 1)[0] + ":***"
    return urlunsplit((parts.scheme, user + at + place, parts.path, "***" if parts.query else "", ""))


def secrets_key(settings: Settings) -> bytes:
    """The 32 bytes under which secrets are encrypted at rest, from the setting or the file that it names.

    Raises SettingInvalid when there is none or it is not a key.
    """
    if settings.secrets_key is not None:
        return read_key(settings.secrets_key, "secrets_key")
    file = settings.path(settings.secrets_key_file)
    try:
        return read_key(file.read_text(encoding="ascii", errors="replace"), str(file))
    except OSError:
        raise SettingInvalid(
            f"There is no key for secrets at rest: set KASSA_SECRETS_KEY, or write 32 bytes as base64 to {file}.",
            name="secrets_key",
        ) from None


def make_secrets_key(settings: Settings) -> bytes:
    """Like `secrets_key`, but makes the file (mode 0600) if there is none. Two processes get the same key."""
    if settings.secrets_key is None:
        _make_key_file(settings.path(settings.secrets_key_file))
    return secrets_key(settings)


def anchor_key(settings: Settings) -> bytes | None:
    """The 32 bytes of the Ed25519 key that signs anchors; None when there is no such file: then nothing is anchored.

    Raises SettingInvalid when the file does not hold a key.
    """
    file = settings.path(settings.anchor_key_file)
    try:
        return read_key(file.read_text(encoding="ascii", errors="replace"), str(file))
    except OSError:
        return None


def make_anchor_key(settings: Settings) -> bytes | None:
    """Like `anchor_key`, but makes the file (mode 0600) if there is none."""
    _make_key_file(settings.path(settings.anchor_key_file))
    return anchor_key(settings)


def _make_key_file(file: Path) -> None:
    """The key goes to a file of its own first and is linked into place, so that nobody can ever read half of one."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as opened:
            opened.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        with suppress(FileExistsError):
            # Perhaps another process was first; then its key counts.
            os.link(fresh, file)
    finally:
        fresh.unlink()


def read_key(text: str, source: str) -> bytes:
    """32 bytes from base64 or hex. Raises SettingInvalid, without showing the text."""
    text = text.strip()
    try:
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise SettingInvalid(f"The key from {source} is not 32 bytes in base64 or hex.", name="secrets_key")
    return key
