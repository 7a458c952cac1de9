"""Which DeepSpeed configs are made, taken over and refused."""

import json

import pytest
import torch

from lit_sparse.distributed import DeepSpeedSparseStrategy, Ranks, shard_sequence
from lit_sparse.distributed.options import DECIDED, deepspeed_config


def _config(stage=2, optimizer=None, parameters=None, nvme_path=None, given=None):
    return deepspeed_config(stage, optimizer, parameters, nvme_path, given)


def test_arguments_become_a_config():
    made = _config(3, "cpu", "cpu")
    assert made["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert made["train_micro_batch_size_per_gpu"] == 1


def test_a_config_of_ones_own_counts_besides(tmp_path):
    given = {
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000, "overlap_comm": False},
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "steps_per_print": 7,
    }
    (tmp_path / "ds.json").write_text(json.dumps(given))
    for source in (given, str(tmp_path / "ds.json")):
        made = _config(1, given=source)
        assert made["steps_per_print"] == 7
        assert made["zero_optimization"] == {
            "stage": 1,
            "reduce_bucket_size": 1000,
            "overlap_comm": False,
        }
        assert not {"gradient_clipping", "bf16"} & made.keys()


def test_a_config_for_transformers_leaves_precision_to_the_trainer():
    scale = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
    auto = {"fp16": {"enabled": "auto", **scale}, "bf16": {"enabled": "auto"}}
    assert _config(given=auto) == _config()
    with pytest.raises(ValueError, match="strategy.config has fp16: take it out"):
        _config(given={"fp16": {"enabled": "auto", **scale, "hysteresis": 5}})


def test_details_of_an_offload_are_taken_over():
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    made = _config(2, "cpu", given=given)
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("key", DECIDED)
def test_what_the_trainer_decides_is_refused(key):
    with pytest.raises(ValueError, match=rf"strategy.config has {key}: take it out \(.*\), or"):
        _config(given={key: {"enabled": True}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage = 3, but strategy.stage says 2"),
        (
            {"zero_optimization": {"redce_bucket_size": 7}},
            r"zero_optimization.redce_bucket_size = 7, which DeepSpeed does not take: \w",
        ),
        ({"zero_optimization": True}, "zero_optimization = True, but strategy.stage says"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "has zero_optimization.round_robin_gradients: take it out",
        ),
        ({"torch_autocast": {"enabled": True}}, "has torch_autocast: take it out .*precision"),
        ({"managed_gradient_accumulation": False}, "has managed_gradient_accumulation: take it"),
        ({"train_micro_batch_size_per_gpu": 4}, r"= 4, but the data \(a micro-batch is one row\)"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device = 'cpu', but strategy.offload_optimizer says 'none'",
        ),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        _config(given=given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 4}, "strategy.stage must be 0, 1, 2 or 3"),
        ({"optimizer": "gpu"}, "strategy.offload_optimizer must be cpu, nvme or null"),
        ({"stage": 0, "optimizer": "cpu"}, "set strategy.stage to 1, 2 or 3"),
        ({"stage": 2, "parameters": "cpu"}, "offload_parameters needs strategy.stage: 3"),
        ({"stage": 2, "optimizer": "nvme"}, "nvme needs strategy.stage: 3"),
        ({"stage": 3, "optimizer": "nvme"}, "strategy.nvme_path is needed"),
        ({"stage": 3, "optimizer": "nvme", "nvme_path": "/no/such"}, "no folder /no/such"),
        ({"nvme_path": "/tmp"}, "nvme_path is set, but nothing is offloaded"),
        ({"given": "no-such.json"}, "strategy.config: no-such.json cannot be read"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        _config(**arguments)


def test_nvme_without_its_library_is_refused(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        made = _config(3, "nvme", nvme_path=str(tmp_path))
        assert made["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path)
    else:
        with pytest.raises(ValueError, match="async_io, which cannot be built here: install"):
            _config(3, "nvme", nvme_path=str(tmp_path))


def test_a_file_that_is_no_config(tmp_path):
    (tmp_path / "ds.json").write_text("{stage: 3}")
    with pytest.raises(ValueError, match="is not JSON"):
        _config(given=str(tmp_path / "ds.json"))
    (tmp_path / "ds.json").write_text("[3]")
    with pytest.raises(ValueError, match="holds no DeepSpeed config"):
        _config(given=str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel": 0}, "strategy.sequence_parallel must be >= 1"),
        ({"timeout_minutes": 0}, "strategy.timeout_minutes must be > 0"),
    ],
)
def test_the_strategy_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeedSparseStrategy(**options)


def _batch(length=8, rows=1):
    ids = torch.arange(length).repeat(rows, 1)
    positions = torch.cat([torch.arange(3), torch.arange(length - 3)]).repeat(rows, 1)
    tokens = torch.tensor(5)
    return {"input_ids": ids, "position_ids": positions, "labels": ids + 1, "step_tokens": tokens}


def test_a_row_is_cut_in_order():
    batch = _batch()
    parts = [shard_sequence(batch, Ranks(0, 1, rank, 4)) for rank in range(4)]
    for key in ("input_ids", "position_ids", "labels"):
        assert torch.equal(torch.cat([part[key] for part in parts], 1), batch[key])
    for part in parts:
        assert part["cu_seq_lens_q"] == (0, 3, 8)
        assert part["step_tokens"] is batch["step_tokens"]
    assert shard_sequence(batch, Ranks(1, 2)) is batch


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="8 tokens cannot be divided among 3"):
        shard_sequence(_batch(), Ranks(0, 1, 0, 3))
    with pytest.raises(ValueError, match="2 rows under sequence parallelism"):
        shard_sequence(_batch(rows=2), Ranks(0, 1, 0, 2))
