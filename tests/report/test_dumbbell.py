"""The axis on which figures before and after training stand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.report.dumbbell import axis, dumbbell


@pytest.mark.parametrize(
    ("largest", "step", "end"),
    [(0.0, 0.01, 0.01), (0.045, 0.01, 0.05), (0.2, 0.05, 0.2), (0.21, 0.05, 0.25),
     (0.366, 0.1, 0.4), (0.9, 0.2, 1.0), (1.0, 0.2, 1.0)],
)  # fmt: skip
def test_an_axis_ends_at_a_round_share(largest, step, end):
    assert axis(largest) == (step, pytest.approx(end))


@given(st.floats(0, 1))
def test_every_share_is_on_its_axis(largest):
    step, end = axis(largest)
    assert largest <= end + 1e-9 and 1 <= round(end / step) <= 5


def test_rows_are_placed_by_their_share_of_the_axis():
    change = {"value": 0.1, "low": 0.02, "high": 0.18, "clear": True}
    loss = {"value": -0.1, "low": -0.3, "high": 0.1, "clear": False}
    found = dumbbell(
        "x",
        ["difference", "other"],
        [
            ("a", {"value": 0.1, "low": 0.05, "high": 0.2}, {"value": 0.2}, [change, None]),
            ("b", {"value": 0.3}, {"value": 0.2}, [loss, {"value": 0.0}]),
            ("c", {"value": 0.4}, None, [None, None]),
        ],
    )
    assert [label for label, _ in found.ticks] == ["0%", "10%", "20%", "30%", "40%"]
    first, second, third = found.rows
    assert (first.before.at, first.before.low, first.before.high) == pytest.approx((25, 12.5, 50))
    assert first.after.at == pytest.approx(50) and first.before.text == "10.0%"
    assert first.differences[0].text == "+10.0" and first.differences[0].direction == "better"
    assert first.differences[0].interval == "+2.0 to +18.0"
    assert second.differences[0].direction == "" and second.differences[1].text == "+0.0"
    assert third.after is None and third.differences[0].text == ""
