"""What the C++ ops return, in shapes and dtypes alone: for torch.compile, FakeTensor and opcheck."""

import torch
from torch import Tensor


@torch.library.register_fake("nrt_fast::sample_logprob")
def sample_logprob(
    logits_NV: Tensor, uniform_N: Tensor, temperature: float, floor_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    N = logits_NV.shape[0]
    return logits_NV.new_empty(N, dtype=torch.int64), logits_NV.new_empty(N, dtype=torch.float32)


@torch.library.register_fake("nrt_fast::philox_uniform")
def philox_uniform(seed: int, step: int, *counters: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(counter.shape for counter in counters))
    return counters[0].new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("nrt_fast::adamw")
def adamw(*_) -> None:
    pass


@torch.library.register_fake("nrt_fast::grad_norm")
def grad_norm(grad: Tensor) -> Tensor:
    return grad.new_empty(())


@torch.library.register_fake("nrt_fast::linear_logprob")
def linear_logprob(hidden_ND: Tensor, *_) -> Tensor:
    return hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)


@torch.library.register_fake("nrt_fast::linear_logprob_stats")
def linear_logprob_stats(hidden_ND: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(3))


@torch.library.register_fake("nrt_fast::linear_logprob_loss")
def linear_logprob_loss(hidden_ND: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden_ND.new_empty((), dtype=torch.float32)
    logprob_N, entropy_N = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))
    return loss, logprob_N, entropy_N, hidden_ND.new_empty(hidden_ND.shape)


@torch.library.register_fake("nrt_fast::pack_panels")
def pack_panels(*_) -> None:
    pass


@torch.library.register_fake("nrt_fast::panel_linear")
def panel_linear(x_TK: Tensor, panels: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
    return x_TK.new_empty(len(x_TK), num_outputs)


@torch.library.register_fake("nrt_fast::panel_logits")
def panel_logits(x_TK: Tensor, panels: Tensor, num_outputs: int) -> Tensor:
    return x_TK.new_empty(len(x_TK), num_outputs, dtype=torch.float32)


@torch.library.register_fake("nrt_fast::rms_norm")
def rms_norm(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("nrt_fast::add_rms_norm")
def add_rms_norm(x_TD: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)


@torch.library.register_fake("nrt_fast::rms_norm_backward")
def rms_norm_backward(x: Tensor, weight_D: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight_D.new_empty(weight_D.shape)


@torch.library.register_fake("nrt_fast::swiglu")
def swiglu(gate_up_T2F: Tensor) -> Tensor:
    return gate_up_T2F.new_empty(gate_up_T2F.shape[0], gate_up_T2F.shape[2])


@torch.library.register_fake("nrt_fast::swiglu_backward")
def swiglu_backward(gate_up_T2F: Tensor, grad_TF: Tensor) -> Tensor:
    return gate_up_T2F.new_empty(gate_up_T2F.shape)


@torch.library.register_fake("nrt_fast::rotate")
@torch.library.register_fake("nrt_fast::rotate_backward")
def rotate(q_THE: Tensor, k_TKE: Tensor, *_) -> tuple[Tensor, Tensor]:
    return q_THE.new_empty(q_THE.shape), k_TKE.new_empty(k_TKE.shape)


@torch.library.register_fake("nrt_fast::rotate_write")
def rotate_write(q_THE: Tensor, *_) -> Tensor:
    return q_THE.new_empty(q_THE.shape)


@torch.library.register_fake("nrt_fast::packed_attention")
def packed_attention(q_THE: Tensor, *_) -> tuple[Tensor, Tensor]:
    T, H, _ = q_THE.shape
    return q_THE.new_empty(q_THE.shape), q_THE.new_empty(2, H, T, dtype=torch.float32)


@torch.library.register_fake("nrt_fast::packed_attention_backward")
def packed_attention_backward(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q_THE, k_TKE, v_TKE))


# Their results never require a gradient, even of operands that do: nrt_fast.backward gives some of them one.
_not_differentiable = torch.library.Library("nrt_fast", "IMPL")
for _name in (
    "linear_logprob", "linear_logprob_stats", "linear_logprob_loss", "pack_panels", "panel_linear", "panel_logits",
    "rms_norm", "add_rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotate", "rotate_backward",
    "rotate_write", "packed_attention", "packed_attention_backward",
):  # fmt: skip
    _not_differentiable.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("nrt_fast::prefix_attention")
def prefix_attention(q_THE, *_, **__):
    return q_THE.new_empty(q_THE.shape)


@torch.library.register_fake("nrt_fast::aggregate_rewards")
def aggregate_rewards(
    logc_C: Tensor, logb_A: Tensor, closed_N: Tensor, cu_answers: Tensor, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, P = closed_N.shape[0], cu_answers.shape[0] - 1
    reward_N, shaped_N, advantage_N = (logc_C.new_empty(N) for _ in range(3))
    signal_P = closed_N.new_empty(P)
    return reward_N, logc_C.new_empty(P), shaped_N, advantage_N, signal_P, logc_C.new_empty(logc_C.shape[0])
