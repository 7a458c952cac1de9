import pytest

from lit_sparse import Budget
from lit_sparse.training import Curriculum, Doubling, Stage


def test_a_step_finds_its_stage():
    curriculum = Curriculum([Stage(512, 3), Stage(512, 1), Stage(2048, 2)])
    assert [curriculum.index_at(step) for step in range(8)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert curriculum.at(4).length == 2048
    assert curriculum.total_steps == 6
    assert curriculum.longest == 2048


def test_doubling():
    budget = Budget.fixed(64)
    curriculum = Curriculum.doubling(512, 4096, 10, attention="dense", budget=budget)
    assert [stage.length for stage in curriculum.stages] == [512, 1024, 2048, 4096]
    assert {stage.steps for stage in curriculum.stages} == {10}
    assert {stage.attention for stage in curriculum.stages} == {"dense"}
    assert {stage.budget for stage in curriculum.stages} == {budget}
    uneven = Doubling(first=512, last=1024, steps=[5, 7], rope={"rule": "abf"}).stages()
    assert uneven == [
        Stage(512, 5, rope={"rule": "abf"}),
        Stage(1024, 7, rope={"rule": "abf"}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((512, 3000, 10), "3000 is not 512 doubled; the nearest that are: 2048 and 4096"),
        ((512, 256, 10), "1 <= first <= last, got 512 and 256"),
        ((512, 2048, [1, 2]), "steps has 2 numbers for the 3 stages of lengths 512, 1024, 2048"),
        ((512, 1024, [1, 0]), r"stages\[1\].steps must be >= 1"),
    ],
)
def test_doubling_that_does_not_work_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.doubling(*arguments)


def test_the_learning_rate_is_that_of_the_stage_or_of_the_run():
    curriculum = Curriculum([Stage(64, 2), Stage(64, 1, learning_rate=1e-5), Stage(64, 1)])
    rates = [curriculum.learning_rate(step, 1e-3) for step in range(5)]
    assert rates == [1e-3, 1e-3, 1e-5, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "curriculum.stages is empty"),
        ([Stage(0, 1)], r"curriculum.stages\[0\].length"),
        ([Stage(64, 0)], r"curriculum.stages\[0\].steps"),
        ([Stage(64, 1, attention="flash")], r"curriculum.stages\[0\].attention"),
        ([Stage(64, 1, budget={"alpha": 1})], r"curriculum.stages\[0\].budget must be a Budget"),
        ([Stage(64, 1, learning_rate=0)], r"curriculum.stages\[0\].learning_rate must be pos"),
        ([Stage(64, 1, mixture={})], r"curriculum.stages\[0\].mixture must be weights"),
        ([Stage(64, 1, mixture={"a": 0.0})], r"stages\[0\].mixture .* not all 0, got {'a': 0.0}"),
        ([Stage(64, 1, mixture={"a": 2, "b": -1})], r"stages\[0\].mixture .* >= 0"),
        ([Stage(64, 1, rope={})], r"stages\[0\].rope must be parameters, a rule or null"),
        ([Stage(64, 1, rope={"rule": "alibi"})], r"stages\[0\].rope: no rule 'alibi'"),
        (
            [Stage(128, 1), Stage(64, 1)],
            r"curriculum.stages\[1\].length = 64 is shorter .* \(128\)",
        ),
    ],
)
def test_a_bad_stage_is_named(stages, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(stages)


def test_check_names_the_stage_and_what_would_fit():
    curriculum = Curriculum([Stage(512, 1), Stage(1000, 1)])
    curriculum.check(row_tokens=1000)
    with pytest.raises(
        ValueError, match=r"stages\[1\].length = 1000 exceeds data.row_tokens = 900"
    ):
        curriculum.check(row_tokens=900)
    with pytest.raises(
        ValueError, match=r"stages\[1\].length = 1000 .* nearest that are: 960 and 1024"
    ):
        curriculum.check(row_tokens=4096, block=64)
