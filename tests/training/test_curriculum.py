import pytest

from lit_sparse.training import Curriculum, Stage


def test_a_step_finds_its_stage():
    curriculum = Curriculum([Stage(512, 3), Stage(512, 1), Stage(2048, 2)])
    assert [curriculum.index_at(step) for step in range(8)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert curriculum.at(4).length == 2048
    assert curriculum.total_steps == 6
    assert curriculum.longest == 2048


def test_doubling():
    curriculum = Curriculum.doubling(512, 4096, 10, attention="dense")
    assert [stage.length for stage in curriculum.stages] == [512, 1024, 2048, 4096]
    assert {stage.steps for stage in curriculum.stages} == {10}
    assert {stage.attention for stage in curriculum.stages} == {"dense"}
    with pytest.raises(ValueError, match="3000 is not 512 doubled"):
        Curriculum.doubling(512, 3000, 10)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "curriculum.stages is empty"),
        ([Stage(0, 1)], r"curriculum.stages\[0\].length"),
        ([Stage(64, 0)], r"curriculum.stages\[0\].steps"),
        ([Stage(64, 1, attention="flash")], r"curriculum.stages\[0\].attention"),
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
