"""What several ranks send one another in a step: bytes, and seconds where a measured bandwidth is given.

Arithmetic on a model's shape and a run's sizes, as the memory plan is; docs/distributed.md derives it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nrt_fast.plan import DTYPE_BYTES, GIB, Sizes

GB = 1_000_000_000  # the unit of links


@dataclass(frozen=True)
class Communication:
    """Bytes of one rollout and what is learnt from it; those that are on every rank in the end count once.

    Attributes:
        num_ranks: N.
        dtype: of the weights.
        num_parameters: those that are trained.
        num_updates: optimizer steps of a rollout.
        num_prompts: of a rollout.
        sizes: of the run.
        bandwidth_gb_s: bus bandwidth between the ranks, as nccl-tests measure it; None where it is not known.
    """

    num_ranks: int
    dtype: str
    num_parameters: int
    num_updates: int
    num_prompts: int
    sizes: Sizes
    bandwidth_gb_s: float | None = None

    @property
    def gradient_bytes(self) -> int:
        """Summed in fp32, each rank a slice."""
        return 4 * self.num_parameters * self.num_updates

    @property
    def weight_bytes(self) -> int:
        """Gathered from the slices."""
        return DTYPE_BYTES[self.dtype] * self.num_parameters * self.num_updates

    @property
    def group_bytes(self) -> int:
        """Of the hosts, at most: ids and log-probabilities of traces and answers, and what the trainer measured."""
        sizes, num_traces = self.sizes, self.num_prompts * max(1, self.sizes.num_generations)
        sampled = num_traces * (8 * sizes.trace + 4) + 4 * (num_traces + self.num_prompts) * sizes.answer
        return sampled + 8 * num_traces * (sizes.trace + 1 + sizes.answer)

    @property
    def seconds(self) -> float | None:
        """On the wire, of gradients and weights; None without a bandwidth."""
        if self.bandwidth_gb_s is None:
            return None
        return self._sent(self.gradient_bytes + self.weight_bytes) / (self.bandwidth_gb_s * GB)

    def _sent(self, num_bytes: int) -> float:
        """By each rank, and received: a slice of its own stays where it is."""
        return num_bytes * (self.num_ranks - 1) / self.num_ranks

    def __str__(self) -> str:
        """A table: GiB of each kind, and what each rank sends of it."""
        rows = (
            ("gradients", self.gradient_bytes, "summed in fp32, a slice to each rank"),
            ("weights", self.weight_bytes, f"in {self.dtype}, from the slices"),
            ("groups", self.group_bytes, f"at most, between hosts: ids and log-probabilities of {self._groups()}"),
        )
        lines = [f"communication of {self.num_ranks:,} ranks in one step, {self.num_updates} optimizer step(s)"]
        for name, num_bytes, note in rows:
            sent = f"each rank sends and receives {self._sent(num_bytes) / GIB:,.4f}"
            lines.append(f"  {name:<16} {num_bytes / GIB:>9,.4f}  GiB {note}; {sent}")
        told = "not told: bus_bandwidth_gb_s is not given (what nccl-tests' all_gather_perf measures between the ranks)"
        if self.seconds is not None:
            told = f"{self.seconds:.3f} s on the wire at {self.bandwidth_gb_s:g} GB/s, gradients and weights"
        return "\n".join([*lines, f"  time             {told}"])

    def _groups(self) -> str:
        return f"{self.num_prompts:,} x {max(1, self.sizes.num_generations)} traces"
