import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.core.command_line import UsageError
from fedlearn.runner.tuning.search_space import Range, parse_space


def test_ranges_and_fixed_settings_are_divided():
    space = parse_space(
        ["scenario=digits", "local.learning_rate=loguniform(1e-3,1)", "strategy=choice(fedavg,fedprox)"]
    )
    assert space.fixed == ("scenario=digits",)
    assert space.ranges["local.learning_rate"] == Range("loguniform", 1e-3, 1.0)
    assert space.ranges["strategy"].choices == ("fedavg", "fedprox")
    assert space.overrides({"strategy": "fedprox", "local.learning_rate": 0.5}) == [
        "scenario=digits",
        "strategy=fedprox",
        "local.learning_rate=0.5",
    ]


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ("strategy.mu=uniform(1,0)", "strategy.mu=uniform(0.1,0.9)"),
        ("strategy.mu=uniform(0,inf)", "strategy.mu=uniform(0.1,0.9)"),
        ("strategy.mu=uniform(0)", "strategy.mu=uniform(0.1,0.9)"),
        ("strategy.mu=loguniform(0,1)", "strategy.mu=loguniform(1e-3,1)"),
        ("local.epochs=integer(1.5,3)", "local.epochs=integer(1,5)"),
        ("strategy.mu=choice(0.1)", "strategy.mu=choice(0,0.1,1)"),
        ("strategy.mu=choice(1,1)", "strategy.mu=choice(0,0.1,1)"),
        ("strategy.mu=interval(0,1)", "strategy.mu=uniform(0,1)"),
        ("strategy.mu=0.1,1", "strategy.mu=choice(0.1,1)"),
    ],
)
def test_a_wrong_range_is_refused_with_a_right_one(wrong, fix):
    with pytest.raises(UsageError) as refusal:
        parse_space([wrong])
    assert str(refusal.value).startswith(f"{wrong} is not a range")
    assert str(refusal.value).endswith(f"'{fix}'")
    parse_space([fix])


def test_a_search_without_a_range_and_a_setting_with_two_are_refused():
    with pytest.raises(UsageError, match="no setting is searched"):
        parse_space(["rounds=3"])
    with pytest.raises(UsageError, match="searched twice"):
        parse_space(["rounds=integer(1,3)", "rounds=integer(1,4)"])


@given(st.floats(1e-6, 1e6, allow_nan=False), st.floats(1e-6, 1e6, allow_nan=False))
def test_the_text_of_a_number_is_inside_its_range_up_to_six_digits(first, second):
    low, high = sorted((first, second * 2))
    if low < high:
        text = Range("uniform", low, high).text(high)
        assert float(text) == pytest.approx(high, rel=1e-5)
