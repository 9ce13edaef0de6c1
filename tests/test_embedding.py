"""The embedding's gradient, straight into the sum."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_plan import packed_batch, tiny_config

from nrt_fast.model import Model
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.embedding import summed_embedding
from nrt_fast.model.weights import OwnedWeights

SIZE = 50, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens", [[], [3], [7] * 300, [49, 0, 7, 0, 49, 49]], ids=lambda tokens: f"{len(tokens)} tokens"
)
def test_gradient_is_added_to_the_sum(dtype, tokens):
    torch.manual_seed(0)
    weight_VD, tokens_T = torch.randn(SIZE, dtype=dtype, requires_grad=True), torch.tensor(tokens, dtype=torch.int64)
    grad_TD, before = torch.randn(len(tokens), SIZE[1], dtype=dtype), torch.randn(SIZE)
    sums = [before.clone(), before.clone()]
    for grad_VD in sums:
        x_TD = summed_embedding(tokens_T, weight_VD, grad_VD)
        assert torch.equal(x_TD, weight_VD[tokens_T])
        x_TD.backward(grad_TD)
        assert x_TD.grad is None
        assert weight_VD.grad is None
    exact = weight_VD.detach().double().requires_grad_()
    F.embedding(tokens_T, exact).backward(grad_TD.double())
    torch.testing.assert_close(sums[0].double() - before, exact.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(*sums), "in the tokens' order, each time"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_pass_makes_no_gradient_of_the_vocabulary(tied, recompute):
    hf_config = tiny_config("llama", TINY | {"vocab_size": 300, "tie_word_embeddings": tied})
    model = Model(hf_config, OwnedWeights(ModelConfig.from_hf(hf_config), torch.float32, torch.device("cpu")))
    torch.nn.init.normal_(model.weights.flat, std=0.02)
    batch = packed_batch(300, 2, 3, 5, 7, 4)

    def gradient(grad_VD):
        for leaf in model.weights.leaves.values():
            leaf.grad = None
        hidden_TD = model.packed(batch, recompute, grad_VD)
        (hidden_TD * torch.linspace(-1, 1, hidden_TD.numel()).view_as(hidden_TD)).sum().backward()
        return {name: leaf.grad for name, leaf in model.weights.leaves.items()}

    plain, grad_VD = gradient(None), torch.zeros_like(model.embed)
    summed = gradient(grad_VD)
    name = next(name for name, leaf in model.weights.leaves.items() if leaf is model.embed)
    assert summed.pop(name) is None
    torch.testing.assert_close(grad_VD, plain.pop(name), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(summed[other], plain[other]) for other in plain if plain[other] is not None)
