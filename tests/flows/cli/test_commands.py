"""The commands as an operator uses them: on a running system, on a stopped one, and on a database of one's own."""

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.cli.house import ANSWER_S, PROGRAM, Up, environment, kassa, kassa_process, set_up, wait_until
from kassa.cli.main import COMMANDS
from kassa.client import Kassa
from kassa.errors import AuthInvalid
from kassa.workers.loops import NAMES


def read(*arguments: str, **how: Any) -> Any:
    return json.loads(kassa(*arguments, "--json", **how).stdout)


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with set_up() as directory:
        run = Up(directory)
        yield run
        run.stop()


@pytest.fixture
def place(up: Up) -> tuple[str, str]:
    return "--dir", str(up.said["dir"])


def paid(up: Up, order_id: str, amount: int = 100) -> str:
    made = up.waiting(order_id, amount, description="secret tea")
    up.pay(made)
    with up.client() as client:
        wait_until(lambda: client.payments.get(made.id).state == "succeeded")
    return made.id


def test_the_story_of_a_payment_is_told_in_order(up: Up, place: tuple[str, str]) -> None:
    payment = paid(up, "story")

    story = read("payment", "show", payment, *place)

    kinds = [entry["kind"] for entry in story["timeline"]]
    for before, after in (("created", "request"), ("request", "callback"), ("callback", "posting")):
        assert kinds.index(before) < kinds.index(after)
    assert [entry["at"] for entry in story["timeline"]] == sorted(entry["at"] for entry in story["timeline"])
    text = kassa("payment", "show", payment, *place).stdout
    assert "POST /v3/pay/transactions/native" in text and "payment.succeeded" in text
    assert up.said["sandboxes"]["wechat"]["apiv3_key"] not in text


def test_books_balance_and_verify(up: Up, place: tuple[str, str]) -> None:
    paid(up, "books")

    assert set(read("ledger", "balances", *place)["sums"].values()) == {0}
    assert read("ledger", "verify", *place)["is_sound"] is True
    own = read("ledger", "balances", "--merchant", up.said["merchant"], *place)["accounts"]
    payable = next(account for account in own if account["account"] == "merchant_payable")
    lines = read("ledger", "statement", "merchant_payable", *place)["data"]
    assert lines[0]["balance"] == payable["balance"]
    assert [line["version"] for line in lines] == list(range(len(lines), 0, -1))


def test_policies_count_for_the_next_payment(up: Up, place: tuple[str, str]) -> None:
    merchant = up.said["merchant"]
    set_to = read("merchant", "set", merchant, "fee_ppm=10000", "late_success=hold", *place)
    assert (set_to["fee_ppm"], set_to["late_success"]) == (10000, "hold")

    payment = paid(up, "fee", 1000)

    with up.client() as client:
        assert client.payments.get(payment).fee == 10
    refused = kassa("merchant", "set", merchant, "fee_ppm=1%", "late_success=maybe", *place, expect=1)
    assert "fee_ppm" in refused.stderr and "late_success" in refused.stderr
    read("merchant", "set", merchant, "fee_ppm=0", *place)


def test_a_key_that_is_revoked_is_refused_by_the_running_api(up: Up, place: tuple[str, str]) -> None:
    made = read("key", "create", "--label", "till 3", "--scopes", "read", *place)
    with Kassa(made["key"], up.said["api"], timeout_s=ANSWER_S) as client:
        client.balances.get()
        listed = read("key", "list", *place)["data"]
        assert [row["label"] for row in listed if row["id"] == made["id"]] == ["till 3"]
        assert made["key"] not in kassa("key", "list", *place).stdout

        assert read("key", "revoke", made["id"], *place)["state"] == "revoked"

        def is_refused() -> bool:
            try:
                client.balances.get()
            except AuthInvalid:
                return True
            return False

        wait_until(is_refused)


def test_doctor_shows_settings_with_their_source_and_no_secret(up: Up, place: tuple[str, str]) -> None:
    found = read("doctor", *place)

    assert found["ok"] is True
    sources = {setting["name"]: setting["source"] for setting in found["settings"]}
    assert sources["dir"] == "flag --dir"
    assert sources["port"].endswith("up.json")
    text = json.dumps(found) + kassa("doctor", *place).stdout
    for secret in (up.said["api_key"], up.said["database"].split(":")[2].split("@")[0]):
        assert secret not in text


def test_queues_are_listed_and_wrong_uses_are_told(place: tuple[str, str]) -> None:
    assert [one["name"] for one in read("queue", "list", *place)["data"]] == ["webhooks"]
    assert "There is no queue orders" in kassa("queue", "dead", "orders", *place, expect=1).stderr
    assert "There is no queue orders" in kassa("queue", "replay", "orders", "--all", *place, expect=1).stderr
    assert "Say which" in kassa("queue", "replay", "orders", *place, expect=2).stderr
    assert "payment.not_found" in kassa("payment", "show", "pay_1", *place, expect=1).stderr


def test_a_second_up_on_the_same_directory_is_refused_and_disturbs_nothing(up: Up, place: tuple[str, str]) -> None:
    refused = kassa_process("up", *place, "--port", "0", "--json", expect=1)

    assert refused.stdout == ""
    assert f"pid {up.process.pid}" in refused.stderr
    assert up.waiting("beside").state == "processing"


def test_keys_and_books_are_for_their_owner_alone(up: Up) -> None:
    directory, secret = Path(up.said["dir"]), up.said["api_key"]
    files = [file for file in directory.rglob("*") if file.is_file() and "data" not in file.parts]

    open_to_others = [file for file in files if stat.S_IMODE(file.stat().st_mode) & 0o077]

    assert [file for file in open_to_others if secret in file.read_text(errors="replace")] == []
    assert stat.S_IMODE((directory / "up.json").stat().st_mode) == 0o600
    assert {stat.S_IMODE(file.stat().st_mode) for file in (directory / "sandboxes" / "wechat").iterdir()} == {0o600}
    assert secret not in up.errors.read_text()


def test_what_is_not_there_is_told_with_the_exit_code_for_it(tmp_path: Path) -> None:
    nowhere = kassa_process("ledger", "balances", "--dir", str(tmp_path / "none"), expect=1)
    assert "There is no set-up" in nowhere.stderr and nowhere.stdout == ""
    closed = "postgresql://kassa:hush@127.0.0.1:1/kassa"
    unreachable = kassa_process("ledger", "balances", "--database-url", closed, expect=3)
    assert "cannot be reached" in unreachable.stderr and "hush" not in unreachable.stderr
    assert "No such command" in kassa_process("ledgers", expect=2).stderr


def test_the_parts_work_on_a_database_of_ones_own(empty_database_url: str, tmp_path: Path) -> None:
    """As the README sets up production: migrate, merchant, key, channel; then API and workers, each a process."""
    place = ("--dir", str(tmp_path / "house"), "--database-url", empty_database_url)
    too_early = kassa_process("serve", *place, "--port", "0", expect=1)
    assert "kassa migrate" in too_early.stderr
    assert read("migrate", *place)["applied"][0].startswith("0001_")
    assert read("migrate", *place)["applied"] == []
    assert "KASSA_SECRETS_KEY" in kassa("merchant", "create", "My shop", *place, expect=1).stderr
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "kassa.toml").write_text('secrets_key = "' + "ab" * 32 + '"\n')

    merchant = read("merchant", "create", "My shop", "fee_ppm=6000", *place)
    key = read("key", "create", *place)["key"]
    sandbox = subprocess.Popen(
        [*PROGRAM, "sandbox", "wechat", "--dir", str(tmp_path / "sandbox"), "--json"],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    api = work = None
    try:
        assert sandbox.stdout is not None
        credentials = sandbox.stdout.readline().decode()
        kept = read("channel", "set", "wechat", "--merchant", merchant["id"], "--from", "-", *place, given=credentials)
        assert kept["state"] == "active" and "apiv3_key" not in kept
        api = subprocess.Popen(
            [*PROGRAM, "serve", *place, "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        work = subprocess.Popen(
            [*PROGRAM, "worker", *place, "--metrics-port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        assert api.stdout is not None and work.stdout is not None
        ready = json.loads(work.stdout.readline())
        assert set(ready["working"]) == set(NAMES)
        assert httpx.get(ready["numbers"], trust_env=False, timeout=ANSWER_S).status_code == 200
        url = json.loads(api.stdout.readline())["api"]
        with Kassa(key, url, timeout_s=ANSWER_S) as client:
            made = client.payments.create(order_id="1", amount=100, currency="CNY", channel="wechat", method="native")
            wait_until(lambda: client.payments.get(made.id).next_action)
        assert httpx.get(f"{url}/readyz", trust_env=False, timeout=ANSWER_S).status_code == 200
        assert "apiv3_key" not in kassa("merchant", "show", *place).stdout
    finally:
        for process in (api, work, sandbox):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=ANSWER_S) == 0
                if process.stdout is not None:
                    process.stdout.close()


def test_the_demo_claims_only_what_is_true() -> None:
    told = json.loads(kassa_process("demo", "--json").stdout)

    assert told["ok"] is True
    assert len(told["claims"]) >= 20


def test_a_seed_is_lived_through_again() -> None:
    first, again = (read("simulate", "--seed", "7")["last"]["digest"] for _ in range(2))

    assert first == again


def test_worlds_follow_one_another_until_ctrl_c() -> None:
    forever = subprocess.Popen(
        [*PROGRAM, "simulate", "--seed", "0", "--forever"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert forever.stdout is not None
    assert "100 worlds, all good" in forever.stdout.readline()

    forever.send_signal(signal.SIGINT)
    rest, errors = forever.communicate(timeout=ANSWER_S)

    assert (forever.returncode, errors) == (0, "")
    assert rest.endswith("worlds from seed 0, all good.\n")


def test_help_names_every_command() -> None:
    text = kassa_process("--help").stdout

    assert all(name in text for name in COMMANDS)
    for name in COMMANDS:
        assert f"Usage: kassa {name} " in kassa(name, "--help").stdout


def test_help_imports_no_command() -> None:
    """So it is quick; and `kassa queue` needs no API."""
    program = "import sys; from kassa.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"

    for arguments, needless in (("--help", "kassa.cli.up"), ("queue --help", "kassa.api.server")):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments.split()], check=True, capture_output=True, text=True
        )
        assert "kassa.cli.main" in done.stderr.split()
        assert needless not in done.stderr.split()
