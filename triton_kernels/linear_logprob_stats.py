"""Log-probability, log-sum-exp and entropy of ``hidden weight^T``: linear_logprob's kernels with the entropy on."""

from nrt_fast.triton_kernels.linear_logprob import logprob_stats
from torch import Tensor


def linear_logprob_stats(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_N, logsumexp_N, entropy_N), [N] fp32 each, not differentiable; see linear_logprob for the arguments."""
    return logprob_stats(hidden_ND, weight_VD, target_N, inv_temperature_N, entropy=True)
