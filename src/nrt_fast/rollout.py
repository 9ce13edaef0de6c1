"""Sample G traces of each prompt: admit groups, decode, retire what ends, refill, and hand out complete groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nrt_fast.decode import Decoding, Work, prefill
from nrt_fast.model.inference import Inference
from nrt_fast.streams import Group, Stream


@dataclass
class RolloutCounters:
    """Tokens through the model, and what the scheduler did.

    Attributes:
        prefill_tokens: of prompts.
        decode_tokens: ids sampled, delimiters included.
        decode_steps: steps of a batch.
        num_paused: times that a trace gave its pages up.
        recomputed_tokens: ids fed a second time for it.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    num_paused: int = 0
    recomputed_tokens: int = 0


@dataclass(frozen=True)
class Room:
    """What a rollout may use.

    Attributes:
        num_slots: traces decoded at a time.
        answer_length: slots kept for behind each trace of a complete group, and behind its empty trace.
        batch_rows: complete rows that are worth handing out.
    """

    num_slots: int
    answer_length: int
    batch_rows: int = 64


def rollout(
    inference: Inference, decoding: Decoding, groups: list[Group], room: Room, num_steps: int, counters: RolloutCounters
) -> Iterator[list[Group]]:
    """Decode every stream of the groups, in slots that are refilled as they fall free; yields complete groups.

    A token's noise is keyed by what it is, so neither the order nor the number of slots nor a pause changes a trace.
    What is yielded has its keys and values but for those that were dropped where pages were short. There is room for
    all of them, and for ``room.answer_length`` slots behind each row; the caller releases it before it asks for more.

    Args:
        groups: longest expected first; none is in the cache yet.
        num_steps: between two looks of the host.

    Raises:
        RuntimeError: nothing can go on, since others hold the pages.
    """
    schedule = Schedule(inference, decoding, groups, room, counters)
    while schedule.is_unfinished:
        goes_on = schedule.admit()
        schedule.decode(num_steps)
        for part in schedule.complete():
            goes_on = True
            yield part
        if not goes_on:
            free = f"{decoding.cache.num_free} of {decoding.cache.num_pages} pages are free"
            raise RuntimeError(
                f"no trace can go on: {free}, another call holds the others; end it or close its iterator"
            )


class Schedule:
    """Which streams hold slots and pages.

    A stream waits, is active (has a slot), or is over. Streams that are over keep their pages until their group is
    complete and handed out. When pages run out, the youngest group gives up streams, the last ones first: their ids
    stay, and their keys and values are computed again.
    """

    def __init__(
        self, inference: Inference, decoding: Decoding, groups: list[Group], room: Room, counters: RolloutCounters
    ):
        self.inference, self.decoding, self.cache, self.room = inference, decoding, decoding.cache, room
        self.counters = counters
        self.groups = list(groups)  # not handed out yet, oldest first
        self.active: set[Stream] = set()
        self.mean_length = decoding.sampling.max_length / 2
        self._num_over = 0

    @property
    def is_unfinished(self) -> bool:
        """Some group is not handed out."""
        return bool(self.groups)

    def admit(self) -> bool:
        """Fill free slots with waiting streams, whole groups where they fit; refills wait until they pay.

        Returns whether any stream goes on.
        """
        num_free = self.room.num_slots - len(self.active)
        if self.active and num_free < max(1, self.room.num_slots // 10):
            return True
        pages = self.cache.num_free - sum(self._pages_to_come(stream) for stream in self.active)
        work: Work = []
        for group in self.groups:
            waiting = [stream for stream in group.streams if not stream.is_over and stream not in self.active]
            if not waiting:
                continue
            needed = self._prompt_pages(group) + sum(map(self._pages_to_come, waiting))
            is_whole = needed <= pages and num_free >= min(len(waiting), self.room.num_slots)
            if (work or self.active) and not is_whole:
                break
            admitted = self._reserve(group, waiting[:num_free])
            if admitted:
                work.append((group, admitted))
            num_free -= len(admitted)
            pages -= needed
        goes_on = bool(work or self.active)
        if work:
            self._start(work)
        return goes_on

    def _prompt_pages(self, group: Group) -> int:
        return self.cache.pages_for(len(group.prompt_ids)) - len(group.prompt.pages)

    def _pages_to_come(self, stream: Stream) -> int:
        """Pages that a stream lacks for its expected length."""
        length = max(round(self.mean_length), len(stream.ids) + 1)
        return max(0, self.cache.pages_for(length) - len(stream.cached.pages))

    def _reserve(self, group: Group, streams: list[Stream]) -> list[Stream]:
        """The streams that get pages for one id more than they have; where nothing runs, others lose theirs."""
        while not self.cache.reserve(group.prompt, len(group.prompt_ids)):
            if self.active or not self._make_room(keep=group):
                return []
        reserved = []
        for stream in streams:
            while not self.cache.reserve(stream.cached, len(stream.ids) + 1):
                if reserved or self.active or not self._make_room(keep=group):
                    return reserved
            reserved.append(stream)
        return reserved

    def _start(self, work: Work) -> None:
        self.counters.prefill_tokens += prefill(self.inference, self.cache, [group for group, _ in work])
        self.counters.recomputed_tokens += sum(len(s.pending) for _, streams in work for s in streams)
        self.decoding.start(work)
        streams = [stream for _, streams in work for stream in streams]
        self.counters.decode_tokens += len(streams)
        self.active |= set(streams)
        self._retire()

    def decode(self, num_steps: int) -> None:
        """Some ids more for every active stream, after the youngest have made room for them."""
        for group in self.groups:
            for stream in group.streams:
                length = min(len(stream.ids) + num_steps, self.decoding.sampling.max_length)
                while stream in self.active and not self.cache.reserve(stream.cached, length):
                    if not self._make_room(group, until=stream):
                        self._pause(group, stream)
        if not self.active:
            return
        work = [(g, [s for s in g.streams if s in self.active]) for g in self.groups]
        work = [(group, streams) for group, streams in work if streams]
        before = sum(s.num_sampled + (s.end is not None) for s in self.active)
        self.counters.decode_steps += self.decoding.run(work, num_steps)
        self.counters.decode_tokens += sum(s.num_sampled + (s.end is not None) for s in self.active) - before
        self._retire()

    def _retire(self) -> None:
        for stream in [stream for stream in self.active if stream.is_over]:
            self.active.discard(stream)
            self._num_over += 1
            self.mean_length += (stream.num_sampled - self.mean_length) / self._num_over

    def complete(self) -> Iterator[list[Group]]:
        """Hand out complete groups: when they are worth a pass, when pages are short, or when nothing else goes on."""
        while complete := [group for group in self.groups if group.is_over]:
            rows = sum(len(group.streams) + 1 for group in complete)
            if self.active and rows < self.room.batch_rows and not self._is_short():
                return
            part = self._with_answers(complete)
            if not part:
                return
            self.groups = [group for group in self.groups if group not in part]
            yield part

    def _is_short(self) -> bool:
        return self.cache.num_free < self.cache.num_pages // 8

    def _with_answers(self, complete: list[Group]) -> list[Group]:
        """As many of the complete groups as there is room for; the first one may take it from all others."""
        part, needed = [], 0
        for group in complete:
            while (own := self._answer_pages(group)) + needed > self.cache.num_free:
                if part or not self._make_room(keep=group):
                    break
            else:
                part.append(group)
                needed += own
        return part

    def _answer_pages(self, group: Group) -> int:
        """Pages that a group lacks to be scored: for the answers, the empty trace, and what was dropped."""
        pages_for, length = self.cache.pages_for, self.room.answer_length
        rows = [(len(group.prompt_ids), group.prompt)] + [(len(s.ids) + length, s.cached) for s in group.streams]
        return pages_for(length) + sum(max(0, pages_for(size) - len(cached.pages)) for size, cached in rows)

    def _make_room(self, keep: Group, until: Stream | None = None) -> bool:
        """Take the pages of one stream, the last one of the youngest group but for what is kept; False: there is none.

        Args:
            keep: a group that loses nothing, or only the streams behind ``until``; then older groups are kept too.
        """
        for group in reversed(self.groups):
            if group is keep and until is None:
                continue
            for stream in reversed(group.streams):
                if stream is until:
                    return False
                if stream.cached.pages:
                    self._pause(group, stream)
                    return True
            if group.prompt.pages and group is not keep:
                group.release(self.cache)
                return True
        return False

    def _pause(self, group: Group, stream: Stream) -> None:
        self.counters.num_paused += stream in self.active
        self.active.discard(stream)
        self.cache.drop(stream.cached)
