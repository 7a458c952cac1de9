import pytest
import torch

from lit_sparse.calibration import Needs


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def simulate():
    """Needs of rows from the last quarters of documents: `law(n)` keys times lognormal factors.

    law maps contexts [N, 1, 1] to [N, layers, heads]; a document has a factor of its own in every
    head, a row another. Counted upwards in whole keys, blocks of one key.
    """

    def build(
        law,
        *,
        documents=32,
        rows=8,
        of_document=0.0,
        of_row=0.0,
        lengths=(512, 1024, 2048, 4096),
        sigma=1.0,
        logit_range=12.0,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        document = torch.arange(documents).repeat_interleave(rows)
        length = torch.tensor(lengths)[document % len(lengths)]
        late = 0.75 + 0.25 * torch.rand(len(document), generator=generator)
        context = (length * late).ceil().long()
        n = context.double()[:, None, None]
        keys = law(n)
        own = torch.randn(documents, *keys.shape[1:], generator=generator)[document]
        noise = of_document * own + of_row * torch.randn(keys.shape, generator=generator)
        keys = torch.minimum((keys * noise.exp()).ceil().clamp(min=1), n).float()
        ones = torch.ones_like(keys)
        return Needs(
            document=document,
            context=context,
            keys=keys,
            block_keys=keys,
            support=keys,
            logit_range=logit_range * ones,
            logit_std=sigma * ones,
            block=1,
        )

    return build
