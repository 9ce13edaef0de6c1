"""Rows of a tensor, some of them several times."""

from torch import Tensor


def gather_rows(x_TKE: Tensor, index_R: Tensor, copies_R: Tensor, cu_copies: Tensor) -> Tensor:
    """x[index]; its gradient adds up every row's copies.

    Args:
        x_TKE: [T, K, E], any strides.
        index_R: [R] int64, the row of x in each place.
        copies_R: [R] int64, the places of row 0, then those of row 1 and so on: ``index_R.argsort(stable=True)``.
        cu_copies: [T + 1] int64, where each row's places start in it.

    Returns:
        [R, K, E], dense.
    """
    return x_TKE.index_select(0, index_R)
