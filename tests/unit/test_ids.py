"""Names of things."""

from kassa.ids import event_name, new_id, time_digits


def test_digits_of_time_grow_with_what_is_made_later() -> None:
    first, later = "01932b1f5b2a7abc8123456789abcdef", "01932b1f5b2b7000800000000000000"
    assert time_digits(first) == "01932b1f5b2a" < str(time_digits(f"{later}0")) == "01932b1f5b2b"
    assert str(time_digits(event_name(1, 255, 9))) < str(time_digits(event_name(1, 256, 0)))
    assert len(str(time_digits(new_id()))) == len(str(time_digits(event_name(2**15 - 1, 2**63 - 1, 2**15 - 1)))) == 12


def test_other_names_have_no_time() -> None:
    for name in ("", "order-1", new_id().upper(), f"{new_id()}0", "evt_1", f"pay_{new_id()}", "0123456789ab\n"):
        assert time_digits(name) is None
