import pytest
import torch
import torch.nn.functional as F

from lit_sparse.training.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_equals_the_whole_cross_entropy_with_gradients(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50)
    hidden = torch.randn(1, 100, 16, requires_grad=True)
    labels = torch.randint(50, (1, 100))
    labels[0, ::3] = -100

    ours = chunked_cross_entropy(hidden, head, labels, chunk)
    ours_grads = torch.autograd.grad(ours, [hidden, *head.parameters()])
    whole = F.cross_entropy(head(hidden)[0], labels[0], reduction="sum")
    whole_grads = torch.autograd.grad(whole, [hidden, *head.parameters()])
    torch.testing.assert_close(ours, whole)
    for a, b in zip(ours_grads, whole_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_predict_is_zero_and_has_a_gradient():
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.nn.Linear(4, 9), torch.full((1, 5), -100))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


def test_logits_exist_one_chunk_at_a_time():
    sizes = []

    def head(x):
        sizes.append(len(x))
        return x

    chunked_cross_entropy(torch.randn(1, 20, 4), head, torch.zeros(1, 20, dtype=torch.long), 8)
    assert sizes == [8, 8, 4]
