"""Where each setting comes from, and what nobody may see."""

import base64
import stat
from pathlib import Path

import pytest

from kassa.errors import SettingInvalid
from kassa.settings import Settings, load, make_secrets_key, secrets_key, without_password

KEY = base64.b64encode(b"k" * 32).decode()


def sources(**given: object) -> dict[str, str]:
    loaded = load(given.get("flags"), given.get("environ", {}), directory=str(given["directory"]))  # type: ignore[arg-type]
    return {origin.name: origin.source for origin in loaded.origins}


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "kassa.toml").write_text("port = 1\npool_max = 11\nhost = '::1'\n")
    environ = {"KASSA_PORT": "2", "KASSA_POOL_MAX": "12"}

    loaded = load({"port": 3, "host": None}, environ, directory=str(tmp_path))

    assert (loaded.settings.port, loaded.settings.pool_max, loaded.settings.host) == (3, 12, "::1")
    came = {origin.name: origin.source for origin in loaded.origins}
    assert came["port"] == "flag --port"
    assert came["pool_max"] == "environment KASSA_POOL_MAX"
    assert came["host"] == str(tmp_path / "kassa.toml")
    assert came["log_level"] == "default"


def test_every_setting_has_an_origin(tmp_path: Path) -> None:
    assert set(sources(directory=tmp_path)) == set(Settings.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "value"),
    [("KASSA_PORT", "x"), ("KASSA_PORT", "70000"), ("KASSA_IDEMPOTENCY_KEEP_DAYS", "6"),
     ("KASSA_WEBHOOK_ALLOW_PRIVATE", "perhaps"), ("KASSA_POOL_MIN", "99")],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(SettingInvalid, match=name.removeprefix("KASSA_").lower()):
        load({}, {name: value}, directory=str(tmp_path))


def test_a_setting_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kassa.toml").write_text("prot = 1\n")

    with pytest.raises(SettingInvalid, match="prot"):
        load({}, {}, directory=str(tmp_path))


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kassa.toml").write_text("port = = 1\n")

    with pytest.raises(SettingInvalid, match="not TOML"):
        load({}, {}, directory=str(tmp_path))


def test_secrets_are_masked(tmp_path: Path) -> None:
    url = "postgresql://shop:geheim@db:5432/kassa?password=geheim"

    loaded = load({"database_url": url, "secrets_key": KEY}, {}, directory=str(tmp_path))

    shown = " ".join(origin.shown for origin in loaded.origins)
    assert "geheim" not in shown
    assert KEY not in shown
    assert "postgresql://shop:***@db:5432/kassa" in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [("postgresql://h/d", "postgresql://h/d"), ("postgresql://u@h/d", "postgresql://u@h/d"),
     ("postgresql://u:p@h/d", "postgresql://u:***@h/d"), ("postgresql://u:a:b@c@h/d", "postgresql://u:***@h/d")],
)  # fmt: skip
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_the_key_is_made_once_and_only_we_may_read_it(tmp_path: Path) -> None:
    settings = Settings(dir=str(tmp_path / "new"))

    key = make_secrets_key(settings)

    assert key == make_secrets_key(settings) == secrets_key(settings)
    file = tmp_path / "new" / "secrets.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("text", [KEY, (b"k" * 32).hex(), f" {KEY}\n"])
def test_a_key_is_read_from_base64_or_hex(text: str) -> None:
    assert secrets_key(Settings(secrets_key=text)) == b"k" * 32


@pytest.mark.parametrize("text", ["", "short", "!" * 44, "k" * 64, base64.b64encode(b"k" * 31).decode()])
def test_what_is_no_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(SettingInvalid) as refusal:
        secrets_key(Settings(secrets_key=text))

    assert not text or text not in str(refusal.value)


def test_no_key_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingInvalid, match="KASSA_SECRETS_KEY"):
        secrets_key(Settings(dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "brokers"),
    [
        ("postgres", ("postgres",)),
        ("amqp://a,kafka://b", ("amqp://a", "kafka://b")),
        ("amqp://a#x,y,kafka://h:1,i:2#z postgres", ("amqp://a#x,y", "kafka://h:1,i:2#z", "postgres")),
        ("postgres,amqp://u:p@h/v", ("postgres", "amqp://u:p@h/v")),
    ],
)
def test_brokers_of_the_environment_are_separated_by_spaces_or_commas(text: str, brokers: tuple[str, ...]) -> None:
    loaded = load(environ={"KASSA_BROKERS": text})

    assert loaded.settings.brokers == brokers


def test_brokers_are_shown_without_passwords(tmp_path: Path) -> None:
    (tmp_path / "kassa.toml").write_text('brokers = ["amqp://shop:secret@h/v?x=secret#kassa.events", "postgres"]\n')

    loaded = load(environ={}, directory=str(tmp_path))

    (shown,) = [origin.shown for origin in loaded.origins if origin.name == "brokers"]
    assert shown == "amqp://shop:***@h/v?***#kassa.events postgres"
