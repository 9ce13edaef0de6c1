"""Completions of other samplers as traces."""

from __future__ import annotations

from nrt_fast.types import Traces


def split_at_delimiter(sampled_ids: list[int], delimiter_id: int) -> tuple[list[int], bool]:
    """The trace before the first delimiter, and whether there is one; a sampled EOS stays in it."""
    closed = delimiter_id in sampled_ids
    return sampled_ids[: sampled_ids.index(delimiter_id)] if closed else list(sampled_ids), closed


def as_traces(completions: list[list[list[int]]], delimiter_id: int) -> Traces:
    """Traces of ``[P][G]`` completions.

    What the sampler thought of them is not known: log-probabilities of ids are absent, that of a delimiter is 0.
    """
    split = [[split_at_delimiter(ids, delimiter_id) for ids in group] for group in completions]
    return Traces(
        [[trace for trace, _ in group] for group in split],
        [[[] for _ in group] for group in split],
        [[0.0 if closed else None for _, closed in group] for group in split],
    )
