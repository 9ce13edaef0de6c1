"""Log-probabilities of given targets."""

from torch import Tensor


def logsoftmax_gather(logits_NV: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None = None) -> Tensor:
    """``log softmax(inv_temperature * logits)[target]`` of every row.

    Args:
        logits_NV: [N, V] fp32, fp16 or bf16. The Triton backward overwrites them with their gradient.
        target_N: [N] int64 in [0, V).
        inv_temperature_N: [N] fp32 factor of each row's logits; 1 if absent.

    Returns:
        logprob_N: [N] fp32 natural logs, differentiable in logits_NV.
    """
    scaled_NV = logits_NV.float()
    if inv_temperature_N is not None:
        scaled_NV = scaled_NV * inv_temperature_N[:, None]
    return scaled_NV.log_softmax(dim=-1).gather(1, target_N[:, None]).squeeze(1)
