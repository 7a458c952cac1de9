import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def packed():
    """Builds random q [T, Hq, D], k and v [Tk, Hkv, D]; the scale multiplies all three."""

    def build(tokens, hq=4, hkv=2, dim=16, *, keys=None, scale=1.0, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        keys = tokens if keys is None else keys
        shapes = ((tokens, hq, dim), (keys, hkv, dim), (keys, hkv, dim))
        return tuple(
            (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for shape in shapes
        )

    return build


@pytest.fixture
def boundaries():
    """cu_seqlens of the given document lengths."""
    return lambda lengths: [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.fixture
def lists_of():
    """A Selection as `reference.select_blocks` returns it; checks that lists are well formed."""

    def convert(selection):
        offsets = selection.offsets.tolist()
        kept, document, tile = {}, None, 0
        for index in range(len(offsets) - 1):
            previous, document = document, int(selection.plan.document[index])
            tile = tile + 1 if document == previous else 0
            for head in range(len(selection.columns)):
                slots = slice(offsets[index], offsets[index + 1])
                columns = selection.columns[head, slots].tolist()
                entries = selection.entry[head, slots].tolist()
                pairs = list(zip(columns, entries, strict=True))
                assert all(entry == selection.tile for column, entry in pairs if column == -1)
                pairs = sorted(pair for pair in pairs if pair[0] != -1)
                assert all(0 <= entry < selection.tile for _, entry in pairs)
                assert len({column for column, _ in pairs}) == len(pairs)
                kept[document, head, tile] = pairs
        return kept

    return convert


@pytest.fixture
def masked_sdpa():
    """PyTorch's own attention under a boolean mask [Hkv, T, Tk], in our layout."""

    def attend(q, k, v, mask, scale=None):
        groups = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None].repeat_interleave(groups, 1),
            v.transpose(0, 1)[None].repeat_interleave(groups, 1),
            attn_mask=mask.repeat_interleave(groups, 0)[None],
            scale=scale,
        )[0].transpose(0, 1)

    return attend


@pytest.fixture
def with_grads():
    """Output of `attend(q, k, v)` and the gradients under one fixed random cotangent."""

    def run(attend, q, k, v, seed=9):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        generator = torch.Generator().manual_seed(seed)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]

    return run
