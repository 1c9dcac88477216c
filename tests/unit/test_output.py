"""What a terminal is told."""

import pytest

from kassa.cli.output import table


def test_strangers_words_give_a_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    table(["key"], [["\x1b[2Jpay_1\nfoo"]])

    said = capsys.readouterr().out
    assert "\x1b" not in said and "pay_1\ufffdfoo" in said
