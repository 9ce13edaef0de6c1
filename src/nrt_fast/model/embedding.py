"""The embedding's rows, with a gradient of those rows alone."""

import torch.nn.functional as F
from torch import Tensor


def summed_embedding(tokens_T: Tensor, weight_VD: Tensor, grad_VD: Tensor) -> Tensor:
    """Rows of an embedding, [T, D]; the way back adds their gradient to ``grad_VD`` (fp32) instead of the weight's own.

    Autograd's own is a matrix of the whole vocabulary, nearly all zeros, and another one where it is cast to be added.
    """

    def add(x_TD: Tensor) -> None:
        grad_TD = x_TD.grad.to(grad_VD.dtype)
        # In the tokens' order, so that a step repeats itself; on the other one's device neither op keeps it.
        if grad_TD.is_cuda:
            grad_VD.index_put_((tokens_T,), grad_TD, accumulate=True)
        else:
            grad_VD.index_add_(0, tokens_T, grad_TD)
        x_TD.grad = None

    x_TD = F.embedding(tokens_T, weight_VD.detach()).requires_grad_()
    x_TD.register_post_accumulate_grad_hook(add)
    return x_TD
