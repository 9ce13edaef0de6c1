"""The element-wise ops of a decoder layer.

Forward and backward, on a GPU beside torch.compile of the reference and Liger, on a CPU beside the reference and
transformers; on a CPU also forward alone, at the sizes of decoding, beside the reference.
"""

import importlib.util

import pytest
import torch

from nrt_fast import ops
from nrt_fast.reference import layers

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


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def step(function, leaves, constants):
    """Outputs, and gradients for upstream gradients that equal them."""
    outputs = as_tuple(function(*leaves, *constants))
    return *outputs, *torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])


def check(function, reference, leaves, constants):
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = step(reference, wide, [x.double() if isinstance(x, torch.Tensor) else x for x in constants])
    plain = step(reference, leaves, constants)
    for our, their, true in zip(step(function, leaves, constants), plain, exact, strict=True):
        assert (our.double() - true).abs().max() <= 2 * (their.double() - true).abs().max() + 1e-5 * true.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sizes of a GPU")
@pytest.mark.parametrize("op", INPUTS)
def test_forward_and_backward(op, compare, device):
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    inputs, constants = INPUTS[op](randn)
    leaves, reference = [x.requires_grad_() for x in inputs], getattr(layers, op)
    functions = {"ours": getattr(ops, op), "torch": reference, "torch.compile": torch.compile(reference)}
    if peer := liger(op):
        functions["Liger"] = peer
    check(functions["ours"], reference, leaves, constants)
    compare({name: lambda f=function: step(f, leaves, constants) for name, function in functions.items()})


def packed_inputs(randn):
    """Inputs and constants of each op in a packed batch: T = 5000, D = 512, F = 1376, 8 query and 4 key heads of 64."""
    T, D, H, K, E = 5000, 512, 8, 4, 64
    q, k, _ = randn(T, H + 2 * K, E).split([H, K, K], dim=1)
    angles = randn(T, E // 2)
    return {
        "rms_norm": ((randn(T, D), randn(D)), (EPS,)),
        "add_rms_norm": ((randn(T, D), randn(T, D), randn(D)), (EPS,)),
        "swiglu": ((randn(T, 2, 1376),), ()),
        "rotate": ((q, k), (angles.cos(), angles.sin())),
    }


def transformers_piece(op, dtype):
    """What a Llama of transformers runs in its place, with our arguments; modules of a batch of one."""
    from transformers.models.llama import modeling_llama as llama

    norm, silu = llama.LlamaRMSNorm(1, EPS).to(dtype), llama.ACT2FN["silu"]
    del norm.weight  # the argument takes its place, gradient and all

    def rms_norm(x, weight, eps):
        norm.weight = weight
        return norm(x[None])[0]

    def add_rms_norm(x, residual, weight, eps):
        total = residual + x
        return rms_norm(total, weight, eps), total

    def swiglu(gate_up):
        gate, up = gate_up.unbind(1)
        return silu(gate) * up

    def rotate(q, k, cos, sin):
        cos, sin = (torch.cat([x, x], dim=-1)[None] for x in (cos, sin))
        q, k = llama.apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "swiglu": swiglu, "rotate": rotate}[op]


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", INPUTS)
def test_training(op, dtype, compare):
    generator = torch.Generator().manual_seed(0)
    inputs, constants = packed_inputs(lambda *shape: torch.randn(shape, generator=generator).to(dtype))[op]
    leaves, reference = [x.requires_grad_() for x in inputs], getattr(layers, op)
    functions = {"ours": getattr(ops, op), "torch": reference, "transformers": transformers_piece(op, dtype)}
    for function in functions.values():
        check(function, reference, leaves, constants)
    compare({name: lambda f=function: step(f, leaves, constants) for name, function in functions.items()})


def decoding_inputs(randn):
    """Arguments of each op in a step of 64 rows: D = 512, F = 1360, 8 query and 4 key heads of 64."""
    T, D, H, K, E = 64, 512, 8, 4, 64
    q, k, v = randn(T, H + 2 * K, E).split([H, K, K], dim=1)
    angles, (k_pages, v_pages), place = randn(T, E // 2), randn(2, 64, K, 16, E), torch.arange(T)
    return {
        "rms_norm": (randn(T, D), randn(D), EPS),
        "add_rms_norm": (randn(T, D), randn(T, D), randn(D), EPS),
        "swiglu": (randn(T, 2, 1360),),
        "rotate_write": (q, k, v, angles.cos(), angles.sin(), k_pages, v_pages, place, place % 16),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="decoding on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "rotate_write"])
@torch.no_grad()
def test_forward(op, dtype, compare):
    generator = torch.Generator().manual_seed(0)
    arguments = decoding_inputs(lambda *shape: torch.randn(shape, generator=generator).to(dtype))[op]
    function, reference = getattr(ops, op), getattr(layers, op)
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    for our, their, true in zip(*map(as_tuple, (function(*arguments), reference(*arguments), reference(*wide)))):
        assert (our - true).abs().max() <= 2 * (their - true).abs().max() + 1e-5
    compare({"ours": lambda: function(*arguments), "torch": lambda: reference(*arguments)}, rounds=51)
