"""The element-wise ops of a decoder layer, forward and backward, beside torch.compile of the reference and Liger."""

import importlib.util

import pytest
import torch

from nrt_fast import ops
from nrt_fast.reference import layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the reference runs: nothing to compare")
EPS = 1e-5


def add_rms_norm_inputs(randn):
    T, D = 8192, 4096
    return (randn(T, D), randn(T, D), randn(D)), (EPS,)


def rms_norm_inputs(randn):
    T, D = 8192, 4096
    return (randn(T, D), randn(D)), (EPS,)


def swiglu_inputs(randn):
    return (randn(8192, 2, 14336),), ()


def rotate_inputs(randn):
    T, H, K, E = 8192, 32, 8, 128
    angles = randn(T, E // 2)
    return (randn(T, H, E), randn(T, K, E)), (angles.cos(), angles.sin())


INPUTS = {
    "rms_norm": rms_norm_inputs,
    "add_rms_norm": add_rms_norm_inputs,
    "swiglu": swiglu_inputs,
    "rotate": rotate_inputs,
}


def liger(op):
    """Liger's function with our arguments and our rounding, or None. Its rotation overwrites: it is given a copy."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def rotate(q, k, cos, sin):
        cos, sin = (torch.cat([x, x], dim=-1)[None] for x in (cos, sin))
        q, k = LigerRopeFunction.apply(*((x * 1).transpose(0, 1)[None] for x in (q, k)), cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return {
        "rms_norm": lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False),
        "add_rms_norm": lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, eps, 0.0, "llama", False
        ),
        "swiglu": lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(1)),
        "rotate": rotate,
    }[op]


def step(function, leaves, constants):
    """Outputs, and gradients for upstream gradients that equal them."""
    outputs = function(*leaves, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])


def check(function, reference, leaves, constants):
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = step(reference, wide, [x.double() if isinstance(x, torch.Tensor) else x for x in constants])
    plain = step(reference, leaves, constants)
    for our, their, true in zip(step(function, leaves, constants), plain, exact, strict=True):
        assert (our.double() - true).abs().max() <= 2 * (their.double() - true).abs().max() + 1e-5 * true.abs().max()


@pytest.mark.parametrize("op", INPUTS)
def test_forward_and_backward(op, compare, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs, constants = INPUTS[op](randn)
    leaves, reference = [x.requires_grad_() for x in inputs], getattr(layers, op)
    functions = {"ours": getattr(ops, op), "torch": reference, "torch.compile": torch.compile(reference)}
    if peer := liger(op):
        functions["Liger"] = peer
    check(functions["ours"], reference, leaves, constants)
    compare({name: lambda f=function: step(f, leaves, constants) for name, function in functions.items()})
