"""Compiled layers train as they do in eager mode. AOTAutograd stands for Inductor, which takes
minutes, where the test is not slow.
"""

import copy

import pytest
import torch
from pytorch_lightning import Trainer

from lit_sparse import Budget, sparsify
from lit_sparse.callbacks import (
    ContextCurriculum,
    DenseGapMonitor,
    FiniteGuard,
    LongContextEval,
    SparseAttention,
)
from lit_sparse.data import PackedTextDataModule
from lit_sparse.distributed import DeepSpeedSparseStrategy
from lit_sparse.models import scale_budget
from lit_sparse.training import Curriculum, SparseLM, Stage, compilation
from lit_sparse.training.activations import set_activations
from lit_sparse.training.compilation import compile_layers

GPU = torch.cuda.is_available()


@pytest.fixture
def graphs(monkeypatch):
    """Gives the number of graphs so far."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def fit(module, data, callbacks=(), **options):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        **options,
    }
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_gradients_stay(tiny, row, train_and_save, assert_same, graphs, activations):
    model = tiny()
    set_activations(model, activations)
    plain, kept = train_and_save(model, row)
    compile_layers(model)
    for factor in (1.0, 0.5, 1.0):
        scale_budget(model, factor)
        ours, saved = train_and_save(model, row)
    assert_same(ours, plain, tolerance=1e-5)
    assert graphs() == 1, "both layers and both laws share it"
    # Checkpointing is around the graph: only the inputs of layers are kept.
    assert saved == kept or (activations == "keep" and saved < kept)


def test_a_copy_runs_its_own_layers(tiny, row, train, graphs):
    model = tiny(num_hidden_layers=1)
    names = list(model.state_dict())
    compile_layers(model)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    _, before = train(twin, row)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    _, after = train(twin, row)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert graphs() == 1


def test_a_run_with_all_that_changes_in_it(architecture, corpus, graphs):
    """Dense and sparse stages, another RoPE, validation with monitors, generation."""

    def run(compiled):
        torch.manual_seed(0)
        stages = [
            Stage(128, 1, attention="dense"),
            Stage(256, 1),
            Stage(512, 1, rope={"rope_theta": 5e4}, budget=Budget.fixed(96, sink=16, local=0.25)),
        ]
        curriculum = ContextCurriculum(stages)
        data = PackedTextDataModule(
            path=str(corpus),
            row_tokens=512,
            curriculum=curriculum.curriculum,
            validation_rows=1,
        )
        module = SparseLM(
            architecture=architecture,
            warmup_steps=0,
            learning_rate=1e-4,
            activations="recompute",
            compile=compiled,
        )
        watches = [FiniteGuard(), DenseGapMonitor(), LongContextEval(prompts=1)]
        sparse = SparseAttention(Budget.fixed(64, sink=16, local=0.25), block=16, tile=16)
        trainer = fit(module, data, [sparse, curriculum, *watches])
        return module.state_dict(), trainer.callback_metrics

    (plain, shown), (ours, ours_shown) = run(False), run(True)
    # One is dense, one sparse; documents differ from row to row, laws from stage to stage.
    assert graphs() == 2
    assert ours.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5)
    assert {"passkey/generated", "gap/kl", "val/loss"} <= ours_shown.keys()
    assert ours_shown["val/loss"] == pytest.approx(float(shown["val/loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"liger_kernels": True}, "set model.liger_kernels: false"),
        ({"tiled_mlp": 2}, "set model.tiled_mlp: null"),
    ],
)
def test_what_does_not_combine(architecture, options, message):
    with pytest.raises(ValueError, match=rf"model.compile.* {message}"):
        SparseLM(architecture=architecture, compile=True, **options)


def test_zero_3_is_refused():
    trainer = Trainer(accelerator="cpu", strategy=DeepSpeedSparseStrategy(stage=3), logger=False)
    with pytest.raises(ValueError, match=r"model.compile: ZeRO 3 .* strategy.stage to 2 or less"):
        compilation.check_compiler(trainer)


def test_a_machine_without_a_compiler(architecture, corpus, monkeypatch):
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    data = PackedTextDataModule(
        path=str(corpus), row_tokens=512, curriculum=Curriculum([Stage(128, 1)]), validation_rows=1
    )
    with pytest.raises(ValueError, match=r"model.compile needs a C\+\+ compiler"):
        fit(SparseLM(architecture=architecture, compile=True), data)
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_inductor(tiny, row, train, assert_same, kind):
    model = tiny(kind)
    plain = train(model, row)
    torch._dynamo.reset()
    compile_layers(model)
    assert_same(train(model, row), plain, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_on_a_gpu(tiny, row, train):
    """Gradients in bfloat16 err at most three times as much as those of eager mode."""
    row = {name: tensor.cuda() for name, tensor in row.items()}
    # A window: rounding cannot change what is selected.
    law, sizes = Budget.fixed(64, sink=16, local=1.0), {"block": 16, "tile": 16}
    model = sparsify(tiny(hidden_size=64), law, **sizes, backend="reference").cuda().double()
    _, exact = train(model, row)
    _, plain = train(sparsify(model, law, **sizes).bfloat16(), row)
    torch._dynamo.reset()
    compile_layers(model)
    _, ours = train(model, row)

    def error(gradients, name):
        return ((gradients[name].double() - exact[name]).norm() / exact[name].norm()).item()

    for name in exact:
        assert error(ours, name) <= 3 * max(error(plain, name), 1e-6), name
