"""gather_rows: copies of rows, and a gradient that adds them up."""

import pytest
import torch

from nrt_fast import ops
from nrt_fast.reference.gather_rows import copies

pytest.importorskip("triton", reason="the kernel needs triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with ops.use(request.param):
        yield


def make_index(T, R, device):
    """Random rows, row 1 never, row 0 often."""
    index = torch.randint(0, max(T, 1), (R,), generator=torch.Generator().manual_seed(T * R))
    index[index == 1] = 0
    return tuple(x.to(device) for x in (index, *copies(index, T)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "K", "E", "R"), [(0, 2, 8, 0), (1, 1, 1, 0), (7, 2, 80, 40), (5, 3, 361, 20)])
def test_copies_and_their_gradient(T, K, E, R, dtype, backend, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, 2 * K, E, generator=generator).to(device, dtype)[:, K:].requires_grad_()
    upstream = torch.randn(R, K, E, generator=generator).to(device, dtype)
    index, places, cu_copies = make_index(T, R, device)
    out = ops.gather_rows(x, index, places, cu_copies)
    assert torch.equal(out, x[index])
    (gradient,) = torch.autograd.grad(out, x, upstream)
    exact = torch.zeros(T, K, E, dtype=torch.float64, device=device).index_add_(0, index, upstream.double())
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_the_gradient_is_rounded_once(device):
    """Adding in the tensor's own dtype loses what a group's traces say about their prompt."""
    index, places, cu_copies = (x.to(device) for x in (torch.zeros(9).long(), torch.arange(9), torch.tensor([0, 9])))
    x = torch.zeros(1, 1, 1, dtype=torch.float16, device=device, requires_grad=True)
    upstream = torch.ones(9, 1, 1, dtype=torch.float16, device=device)
    upstream[0] = 2048  # in fp16, 2048 + 1 is 2048
    with ops.use("triton"):
        out = ops.gather_rows(x, index, places, cu_copies)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert gradient.item() == 2056


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_an_upstream_gradient_is_read_by_its_strides(layout, backend, device):
    index, places, cu_copies = make_index(5, 12, device)
    upstream = {
        "expanded": torch.arange(12.0, device=device)[:, None, None].expand(12, 2, 3),
        "transposed": torch.randn(3, 2, 12, device=device).permute(2, 1, 0),
    }[layout]
    x = torch.zeros(5, 2, 3, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.gather_rows(x, index, places, cu_copies), x, upstream)
    exact = torch.zeros(5, 2, 3, device=device).index_add_(0, index, upstream.contiguous())
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-5)


def test_bad_input_is_refused(backend, device):
    x, (index, places, cu_copies) = torch.zeros(5, 2, 3, device=device), make_index(5, 12, device)
    with pytest.raises(ValueError, match=r"copies_R: expected shape \[R=12\]"):
        ops.gather_rows(x, index, places[:-1], cu_copies)
    with pytest.raises(ValueError, match=r"x_TKE: expected shape"):
        ops.gather_rows(x[0], index, places, cu_copies)
