"""A model trained on noise: no rule of selection may let it predict what cannot be predicted.

On fresh independent uniform tokens the expected loss of any causal model is ln(vocabulary) or more,
whatever its weights. A list that later rows of a tile helped to choose tells the earlier rows about
the tokens that they are to predict, and training finds that.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.budget import Budget

pytestmark = pytest.mark.slow

VOCABULARY, LENGTH, DOCUMENTS, WIDTH, HEADS = 16, 128, 8, 64, 4
BLOCK, TILE, KEYS = 2, 4, 22  # 6 blocks to choose besides 3 of the window and 2 of the tile
STEPS, LAST = 400, 50
BOUNDARIES = range(0, DOCUMENTS * LENGTH + 1, LENGTH)


def causal(q, k, late):
    budget = Budget.fixed(KEYS, sink=0, local=0.0, late=late)
    return select(q, k, budget, BOUNDARIES, block=BLOCK, tile=TILE)


@torch.no_grad()
def leaky(q, k, late):
    """The same, but the base of a tile is what all the tile's own rows want most."""
    selection = causal(q, k, late)
    plan = selection.plan
    tiles, blocks = LENGTH // TILE, LENGTH // BLOCK
    q = q.view(DOCUMENTS, tiles, TILE, HEADS, -1)
    means = k.view(DOCUMENTS, blocks, BLOCK, HEADS, -1).mean(2)
    logits = torch.einsum("dtrhe,dbhe->hdtrb", q, means) * q.shape[-1] ** -0.5
    number = torch.arange(blocks)

    def of_tiles(values):
        return torch.from_numpy(values).view(DOCUMENTS, tiles, 1)

    hidden = number >= of_tiles(plan.complete)[:, :, None]
    wanted = logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0).sum(3)
    wanted = wanted.masked_fill(number >= of_tiles(plan.first_local), -math.inf)
    order = wanted.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(wanted, dtype=torch.bool)
    chosen.scatter_(-1, order, (number < of_tiles(plan.base)).expand_as(order))
    columns = selection.columns.clone()
    columns[:, plan.base_slots] = chosen.nonzero()[:, 3].view(HEADS, -1).int()
    return Selection(plan, columns, selection.entry)


class Layer(nn.Module):
    def __init__(self, rule, late):
        super().__init__()
        self.rule, self.late = rule, late
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(1)
        q = 4 * q  # sharp from the start: what a row asks for depends on its token
        out, _ = sparse_attention(q, k, v, self.rule(q, k, self.late))
        x = x + self.out(out.flatten(1))
        return x + self.mlp(x)


def excess_loss(rule, late):
    """Mean of loss - ln(vocabulary) over the last steps and its standard error, in nats a token.

    Each batch is fresh and its loss is taken before the step on it: the mean is unbiased.
    """
    torch.manual_seed(0)
    embed, position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
    body = nn.Sequential(Layer(rule, late), Layer(rule, late), nn.LayerNorm(WIDTH))
    head = nn.Linear(WIDTH, VOCABULARY)
    parameters = [position, *nn.ModuleList([embed, body, head]).parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = torch.zeros(STEPS, dtype=torch.float64)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / STEPS)
        tokens = torch.randint(VOCABULARY, (DOCUMENTS, LENGTH + 1))
        x = (embed(tokens[:, :-1]) + position).flatten(0, 1)
        loss = F.cross_entropy(head(body(x)), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()
    excess = losses[-LAST:] - math.log(VOCABULARY)
    return excess.mean().item(), (excess.std() / LAST**0.5).item()


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_noise_cannot_be_learnt(late):
    excess, error = excess_loss(causal, late)
    # It did train: the random guesses of the first steps are unlearnt.
    assert excess < 0.02
    assert excess > -4 * error, f"{excess:.4f} nats a token against the floor, error {error:.4f}"


def test_the_bound_catches_a_list_that_later_rows_helped_to_choose():
    excess, error = excess_loss(leaky, 0.0)
    assert excess < -4 * error
    assert excess < -0.005 * math.log(VOCABULARY)
