"""What a rollout holds on the host while it runs: groups of streams, each with its part of the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from nrt_fast.kv_cache import KVCache, Sequence

MAX_TOKENS = 16384
"""Tokens that go through the model in one pass, unless a single item has more."""

Item = TypeVar("Item")


def in_passes(items: Iterable[tuple[Item, int]]) -> list[list[Item]]:
    """(item, its tokens) in consecutive parts of at most MAX_TOKENS, which bounds what a pass allocates."""
    parts, size = [], MAX_TOKENS
    for item, num_tokens in items:
        if not parts or size + num_tokens > MAX_TOKENS:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += num_tokens
    return parts


@dataclass(eq=False)
class Stream:
    """Ids that follow a prompt, some of them given, the rest sampled.

    Attributes:
        number: of the stream in its group; keys the noise.
        ids: given and sampled ids, without a delimiter that ended them.
        first: ids given; the others are sampled.
        cached: keys and values of the first ``cached.length`` ids.
        logprobs: of the sampled ids.
        end: log-probability of the delimiter that ended it, None where something else did.
        is_over: nothing more is sampled.
    """

    number: int
    ids: list[int] = field(default_factory=list)
    first: int = 0
    cached: Sequence = field(default_factory=Sequence)
    logprobs: list[float] = field(default_factory=list)
    end: float | None = None
    is_over: bool = False

    @property
    def num_sampled(self) -> int:
        """Ids of its own."""
        return len(self.ids) - self.first

    @property
    def pending(self) -> list[int]:
        """Ids that the cache does not hold yet."""
        return self.ids[self.cached.length :]


@dataclass(eq=False)
class Group:
    """A prompt and the streams that go on from it.

    Attributes:
        index: position of the prompt in its call.
        uid: keys the noise.
        prompt_ids: not empty.
        prompt: the prompt in the cache, or empty.
        hidden_D: [D] final hidden state of the prompt's last token, while the prompt is in the cache.
        streams: G of them.
    """

    index: int
    uid: int
    prompt_ids: list[int]
    streams: list[Stream]
    prompt: Sequence = field(default_factory=Sequence)
    hidden_D: Tensor | None = None

    @property
    def is_over(self) -> bool:
        """All of its streams are."""
        return all(stream.is_over for stream in self.streams)

    def release(self, cache: KVCache) -> None:
        """Give all of its pages back."""
        for stream in self.streams:
            cache.drop(stream.cached)
        cache.drop(self.prompt)
        self.hidden_D = None
