"""Rows of a tensor, some of them several times."""

import torch
from torch import Tensor


def gather_rows(x_TKE: Tensor, index_R: Tensor, copies_R: Tensor, cu_copies: Tensor) -> Tensor:
    """x[index]; its gradient adds up every row's copies.

    Args:
        x_TKE: [T, K, E], any strides.
        index_R: [R] int64, the row of x in each place.
        copies_R: [R] int64, the places of row 0, then those of row 1 and so on: see ``copies``.
        cu_copies: [T + 1] int64, where each row's places start in it.

    Returns:
        [R, K, E], dense.
    """
    return x_TKE.index_select(0, index_R)


def copies(index_R: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """What ``gather_rows`` wants beside an index into so many rows: copies_R and cu_copies, where the index is."""
    counts = index_R.bincount(minlength=num_rows)
    return index_R.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
