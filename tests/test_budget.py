import math

import pytest
import torch

from lit_sparse.budget import LONGEST, PRESETS, Budget

# Keys at 8192, 32768, 131072 and 1048576 tokens.
PRESET_KEYS = {
    "eco": (1291, 2048, 3251, 6502),
    "balanced": (1449, 2897, 5793, 16384),
    "safe": (1626, 4096, 10322, 41286),
    "near-lossless": (1824, 5925, 19248, 112722),
}

BUDGETS = {
    "default": Budget(),
    "ceiling": Budget(alpha=4, exponent=0.75, floor=64, ceiling=500),
    "narrow": Budget(alpha=7, exponent=0.3, floor=12, ceiling=12),
    "fixed": Budget.fixed(96),
    "log": Budget.log(20.0),
    "dense": Budget.dense(),
    "share": Budget(alpha=0.25, exponent=1.0, floor=0),
    **{name: Budget.preset(name) for name in PRESETS},
}


@pytest.fixture(params=BUDGETS.values(), ids=BUDGETS.keys())
def budget(request):
    return request.param


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_their_published_numbers(name):
    preset = Budget.preset(name)
    lengths = (8192, 32768, 131072, 1048576)
    assert tuple(preset(n) for n in lengths) == PRESET_KEYS[name]
    assert preset.floor == 1024
    assert [preset(n) for n in (1, 1000, 1024, 1025)] == [1, 1000, 1024, 1024]


def test_preset_takes_overrides_and_names_the_known_ones():
    assert Budget.preset("balanced", floor=0)(100) == 100
    assert Budget.preset("balanced", floor=0)(1024) == 512
    assert Budget.preset("eco", alpha=1.0, floor=0)(1000) == 10
    with pytest.raises(ValueError, match="'thrifty'.*eco, balanced, safe, near-lossless"):
        Budget.preset("thrifty")


def test_defaults_are_those_of_the_balanced_preset():
    assert Budget() == Budget.preset("balanced")
    assert (Budget().sink, Budget().local, Budget().late) == (64, 0.5, 0.1)


def test_ints_and_tensors_agree(budget):
    lengths = [*range(300), 1023, 1024, 1025, 4096, 99_999, 2**20, 2**31 + 7, 2**40]
    by_tensor = budget(torch.tensor(lengths))
    assert by_tensor.dtype == torch.int64
    assert by_tensor.tolist() == [budget(n) for n in lengths]
    assert type(budget(5)) is int
    narrow = budget(torch.tensor([[7, 300]], dtype=torch.int32))
    assert narrow.dtype == torch.int64
    assert narrow.tolist() == [[budget(7), budget(300)]]


def test_never_more_than_the_context_and_never_falling(budget):
    n = torch.arange(1, 20_000)
    keys = budget(n)
    assert (keys <= n).all()
    assert budget.law == "log" or (keys >= 1).all()
    assert (keys.diff() >= 0).all()
    assert budget(0) == 0


@pytest.mark.parametrize(
    ("alpha", "root", "exponent"),
    [(64, 3, 1 / 3), (16, 2, 0.5), (4, 3, 2 / 3), (3, 4, 0.75), (1, 5, 0.8), (7, 5, 0.2)],
)
def test_exact_where_the_law_is_a_whole_number(alpha, root, exponent):
    """0.8 is written a little above 4/5: a bare ceil is one too many at perfect powers."""
    law = Budget(alpha=alpha, exponent=exponent, floor=0)
    power = round(exponent * root)
    for base in range(17, 120):
        n, expected = base**root, alpha * base**power
        assert law(n) == expected
        assert law(n + 1) == expected + 1


def test_rounds_up_between_whole_numbers():
    law = Budget(alpha=1, exponent=0.5, floor=0)
    for n in [*range(1, 3000), 10**10 + 1, 10**12 - 1]:
        assert law(n) == math.isqrt(n - 1) + 1


def test_floor_and_ceiling():
    law = Budget(alpha=2, exponent=0.5, floor=10, ceiling=30)
    expected = {3: 3, 10: 10, 20: 10, 25: 10, 26: 11, 100: 20, 225: 30, 226: 30, 10**9: 30}
    assert {n: law(n) for n in expected} == expected


def test_a_law_past_any_integer_is_still_the_whole_context():
    assert Budget(alpha=1e30, exponent=1.0)(2**50) == 2**50


def test_longest_context_is_the_inverse(budget):
    for keys in (0, 1, 2, 17, 64, 500, 1023, 1024, 1025, 3000):
        longest = budget.longest_context(keys)
        assert budget(longest) <= keys
        if longest < LONGEST:
            assert budget(longest + 1) > keys
        else:
            assert budget(LONGEST) <= keys


def test_longest_context_by_hand():
    assert Budget(alpha=16, exponent=0.5, floor=0).longest_context(1024) == 4096
    assert Budget.dense().longest_context(777) == 777
    assert Budget.fixed(96).longest_context(95) == 95
    assert Budget.fixed(96).longest_context(96) == LONGEST
    assert Budget(floor=1024).longest_context(1000) == 1000
    with pytest.raises(ValueError, match="keys"):
        Budget.fixed(96).longest_context(-1)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 0.5, 0.85, 1.0])
def test_through_a_point(exponent):
    law = Budget.through(2048, 32768, exponent, floor=0, sink=8)
    assert law(32768) == 2048
    assert law.exponent == exponent
    assert law.sink == 8
    assert law(2 * 32768) == math.ceil(2048 * 2**exponent - 1e-6)


def test_dense_below():
    budget = Budget(alpha=4.0, exponent=0.5, floor=0, dense_below=100)
    assert [budget(n) for n in (1, 99, 100, 101, 400)] == [1, 99, 100, 41, 80]
    assert budget.longest_context(30) == 30
    assert budget.longest_context(40) == 40
    assert budget.longest_context(41) == 105
    assert budget.longest_context(80) == 400
    assert str(budget).endswith("dense to 100")
    assert Budget(**budget.to_dict()) == budget


@pytest.mark.parametrize(("k_ref", "n_ref"), [(0, 10), (10, 0), (-1, 5), (float("nan"), 5)])
def test_through_refuses_a_point_without_a_law(k_ref, n_ref):
    with pytest.raises(ValueError, match="k_ref and n_ref"):
        Budget.through(k_ref, n_ref, 0.5)


def test_fixed_log_and_dense():
    assert [Budget.fixed(96)(n) for n in (50, 96, 97, 10**6)] == [50, 96, 96, 96]
    assert [Budget.log(20.0)(n) for n in (1, 2, 1000, 10**6)] == [0, 2, 139, 277]
    assert Budget.log(20.0, floor=30)(1000) == 139
    assert Budget.log(20.0, floor=200)(1000) == 200
    assert [Budget.dense()(n) for n in (1, 77, 2**30 + 1)] == [1, 77, 2**30 + 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", 0),
        ("alpha", -1.0),
        ("alpha", float("inf")),
        ("alpha", float("nan")),
        ("exponent", -0.1),
        ("exponent", 1.1),
        ("exponent", float("nan")),
        ("floor", -1),
        ("floor", 10.5),
        ("floor", True),
        ("ceiling", 0),
        ("ceiling", 1023),
        ("ceiling", 2048.5),
        ("sink", -1),
        ("sink", 1.5),
        ("local", -0.01),
        ("local", 1.01),
        ("late", -0.01),
        ("late", 2),
        ("dense_below", -1),
        ("dense_below", 2.5),
        ("law", "cubic"),
    ],
)
def test_a_wrong_value_is_named(key, value):
    with pytest.raises(ValueError, match=rf"^budget\.{key} must be .*got {value!r}$"):
        Budget(**{key: value})


def test_round_trip_and_use_as_a_key(budget):
    again = Budget(**budget.to_dict())
    assert again == budget
    assert {budget: 1}[again] == 1
    assert again.to_dict() == budget.to_dict()


def test_prints_as_the_law():
    assert str(Budget()) == "k(n) = 16 n^0.5, floor 1024"
    assert str(Budget.log(3.0, floor=2, ceiling=9)) == "k(n) = 3 ln n, floor 2, ceiling 9"
