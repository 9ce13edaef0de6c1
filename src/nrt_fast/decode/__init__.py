"""Streams of ids that go on step by step: in CUDA graphs on a GPU, with little Python a step on a CPU."""

from nrt_fast.decode.decoding import Decoding, Work, prefill
from nrt_fast.decode.graphs import MAX_STEPS, StepGraphs
from nrt_fast.decode.step import Sampling

__all__ = ["MAX_STEPS", "Decoding", "Sampling", "StepGraphs", "Work", "prefill"]
