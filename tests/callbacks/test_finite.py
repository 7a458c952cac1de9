"""A number that is not finite ends a run before the optimizer sees it, with the layer's name."""

import math

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse import Budget
from lit_sparse.callbacks import FiniteGuard, SparseAttention
from lit_sparse.callbacks.not_finite import (
    OutputWatch,
    gradient_norm,
    last_bad_gradient,
    own_gradients,
    watched_layers,
)
from lit_sparse.models import build_model


class Language(LightningModule):
    """A language model; `break_at` (step, micro-batch) -> a function of the module that is called
    before that micro-batch.
    """

    def __init__(self, architecture, break_at, checkpointing=False):
        super().__init__()
        torch.manual_seed(0)
        self.model = build_model(architecture={**architecture, "num_hidden_layers": 3})
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.break_at, self.weights = break_at, []

    def on_train_batch_start(self, batch, batch_idx):
        step = self.trainer.global_step
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            vector = torch.nn.utils.parameters_to_vector(self.parameters())
            self.weights.append(vector.detach().clone())
        if act := self.break_at.get((step, micro_batch)):
            act(self)

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def gradients(module):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return own_gradients(trainer, module)


def output_of(layer, value=math.inf):
    """Once, this layer's output has a value that is not finite."""

    def act(module):
        block = module.model.model.layers[layer]

        def once(_, args, output):
            hook.remove()
            output = output.clone()
            output[0, 5, 3] = value
            return output

        hook = block.mlp.register_forward_hook(once)

    return act


def gradient_of(layer):
    """Once, the gradient that passes this layer is NaN, though the loss is finite."""

    def act(module):
        block = module.model.model.layers[layer]

        def once(_, grad_input, grad_output):
            hook.remove()
            return (torch.full_like(grad_input[0], math.nan),)

        hook = block.self_attn.o_proj.register_full_backward_hook(once)

    return act


def train(module, guard, tmp_path=None, batches=8, **options):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(257, (1, 64), generator=generator) for _ in range(batches)]
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "callbacks": guard if isinstance(guard, list) else [guard],
        "logger": TensorBoardLogger(tmp_path, version="") if tmp_path else False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **options,
    }
    trainer = Trainer(**settings)
    try:
        trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=None))
    finally:
        module.last = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_it_ends_before_the_optimizer_with_the_layer(
    architecture, tmp_path, micro_batch, checkpointing
):
    module = Language(architecture, {(1, micro_batch): output_of(1)}, checkpointing)
    with pytest.raises(
        FloatingPointError, match=r"step 1: the output of model\.model\.layers\.1 is not finite"
    ):
        train(module, FiniteGuard(), tmp_path)
    assert torch.equal(module.last, module.weights[1])
    events = EventAccumulator(str(tmp_path / "lightning_logs")).Reload()
    (event,) = events.Tensors("alerts/not_finite/text_summary")
    assert "| 1 | all | nan |" in event.tensor_proto.string_val[0].decode()
    # transformers has one of its own on the embeddings where it checkpoints.
    assert sum(len(m._forward_hooks) for m in module.modules()) == checkpointing


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_gradient_is_named_by_its_layer(architecture):
    module = Language(architecture, {(2, 0): gradient_of(1)})
    # Backward comes from the end: layer 2 is whole, layer 0 is not.
    with pytest.raises(
        FloatingPointError, match=r"step 2: a gradient in model\.model\.layers\.1 is not finite"
    ):
        train(module, FiniteGuard())
    assert torch.equal(module.last, module.weights[2])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_weight_that_is_not_finite_is_found_in_a_sparse_model(architecture):
    def spoil(module):
        module.model.model.layers[2].self_attn.k_proj.weight.data[0, 0] = math.nan

    module = Language(architecture, {(0, 0): spoil})
    sparse = SparseAttention(Budget(alpha=1, exponent=0.5, floor=32, sink=8), block=16, tile=16)
    with pytest.raises(FloatingPointError, match=r"the output of model\.model\.layers\.2 is"):
        train(module, [FiniteGuard(), sparse])


@pytest.mark.parametrize("reaction", ["warn", "stop", "callable"])
def test_otherwise_the_step_is_thrown_away(architecture, tmp_path, reaction):
    seen = []
    on_alert = (lambda trainer, alert: seen.append(alert)) if reaction == "callable" else reaction
    module = Language(architecture, {(1, 0): output_of(0, math.nan), (2, 0): output_of(0)})
    guard = FiniteGuard(on_alert=on_alert)
    with pytest.warns(
        UserWarning, match=r"not_finite at step 1: the output of .*layers\.0"
    ) as all_:
        trainer = train(module, guard, tmp_path)
    assert sum("not_finite" in str(w.message) for w in all_) == 1  # once in a place
    steps = 2 if reaction == "stop" else 4
    assert trainer.global_step == len(module.weights) == steps
    assert not torch.equal(module.weights[0], module.weights[1])
    after = [*module.weights[2:], module.last]
    assert torch.equal(module.weights[1], after[0])
    assert module.last.isfinite().all()
    assert torch.equal(module.weights[1], module.last) == (reaction == "stop")
    events = EventAccumulator(trainer.log_dir).Reload().Scalars("train/steps_not_finite")
    assert events[-1].value == steps - 2 + (reaction == "stop")
    assert [alert.kind for alert in seen] == ["not_finite"] * (reaction == "callable")
    other = FiniteGuard()
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()


def test_a_healthy_run_is_the_same_with_it(architecture):
    weights = []
    for callbacks in ([], [FiniteGuard()]):
        module = Language(architecture, {})
        train(module, callbacks, batches=4)
        weights.append(module.last)
    assert torch.equal(*weights)


def test_overflow_in_float16_is_left_to_the_gradient_scaler(architecture):
    class Scaler:
        def is_enabled(self):
            return True

    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.precision_plugin.scaler = Scaler()
    module, guard = Language(architecture, {}), FiniteGuard()
    guard.on_train_start(trainer, module)
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tokens = torch.randint(257, (1, 16))
    for infinite in (False, True):
        if infinite:
            output_of(0)(module)
        loss = module.training_step(tokens, 0)
        loss.backward()
        module.model.lm_head.weight.grad[0, 0] = math.inf
        guard.on_before_backward(trainer, module, loss * math.inf)  # what the scaler makes of it
        if infinite:
            with (
                pytest.warns(UserWarning, match="not_finite"),
                pytest.raises(FloatingPointError, match=r"layers\.0"),
            ):
                guard.on_before_optimizer_step(trainer, module, optimizer)
        else:
            guard.on_before_optimizer_step(trainer, module, optimizer)


def test_any_model_is_watched_by_its_layers():
    block = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(5, 3)
    model.body = torch.nn.Module()
    model.body.blocks = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(3, 1), block])
    model.head = torch.nn.Linear(3, 5)
    names = [name for name, _ in watched_layers(model)]
    assert names == ["embed", "body.blocks.0", "body.blocks.1.0", "body.blocks.1.1", "head"]

    watch = OutputWatch(block)
    block(torch.ones(2, 3))
    assert watch.first_bad() is None
    block(torch.full((2, 3), math.nan))
    block(torch.ones(2, 3))
    assert watch.first_bad() == "0"
    watch.forget()
    block(torch.ones(2, 3))
    assert watch.first_bad() is None

    assert last_bad_gradient(gradients(block)) is None
    block(torch.ones(2, 3)).sum().backward()
    block[0].weight.grad[1, 1] = -math.inf
    assert last_bad_gradient(gradients(block)) == "0.weight"


def test_a_compiled_model_is_watched_in_one_graph():
    torch._dynamo.reset()
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    watch = OutputWatch(layers)
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    compiled(torch.ones(2, 3)).sum().backward()
    assert watch.first_bad() is None
    layers[1].weight.data[0, 0] = math.nan
    compiled(torch.ones(2, 3))
    assert watch.first_bad() == "1"


def test_sparse_gradients_are_looked_at_too():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    assert float(gradient_norm(gradients(table))) == pytest.approx(math.sqrt(2 * 2**2 + 2))
    assert last_bad_gradient(gradients(table)) is None
    table.zero_grad()
    (table(torch.tensor([1, 3])) * math.nan).sum().backward()
    assert gradient_norm(gradients(table)).isnan()
    assert last_bad_gradient(gradients(table)) == "weight"


def test_a_norm_that_overflows_is_no_alert():
    class Large(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum() * 1e25

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-30)

    module = Large()
    data = torch.utils.data.DataLoader(torch.ones(2, 2))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[FiniteGuard()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    assert trainer.global_step == 2


def test_options_are_checked():
    with pytest.raises(ValueError, match="FiniteGuard on_alert must be 'raise', 'warn', 'stop' or"):
        FiniteGuard(on_alert="ignore")


def test_all_ranks_do_the_same(two_ranks):
    for mode in ("raise", "warn"):
        first, second = two_ranks[f"guard_{mode}"]
        assert first == second
        assert first["step"] == (1 if mode == "raise" else 4)
        assert first["places"] == [["not_finite", None, None]]
        assert ("the output of layers.2 is not finite" in first["error"]) == (mode == "raise")
        assert all(math.isfinite(x) for x in first["weights"])
