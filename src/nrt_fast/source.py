"""A command's model: device, dtype, shape, tokenizer and delimiter first; then its weights, under an engine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nrt_fast.arena import Arena
from nrt_fast.config import ModelFields, SamplingFields
from nrt_fast.data import Delimiter, check_vocabulary, choose_delimiter, has_tokenizer, load_tokenizer
from nrt_fast.engine import Engine
from nrt_fast.model import Model
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.folders import model_folder, read_config
from nrt_fast.model.lora import Lora
from nrt_fast.model.peft_folder import base_folder, read_lora
from nrt_fast.plan import MemoryPlan, Sizes, plan_inference
from nrt_fast.resolve import SCALES, Scale
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import UserError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Source:
    """A model whose weights are not read yet.

    Attributes:
        folder: Hugging Face folder, of a model or of an adapter.
        tokenizer_folder: the same, or that of the adapter's model.
        lora: the adapter that is there, or is to be made; None without one.
        shape: with a row for the delimiter, which may have been added to the tokenizer.
    """

    folder: Path
    tokenizer_folder: Path
    lora: Lora | None
    device: torch.device
    dtype: torch.dtype
    shape: ModelConfig
    tokenizer: Any
    delimiter: Delimiter

    @property
    def dtype_name(self) -> str:
        """float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def engine(self, config: SamplingFields, cache_bytes: int, arena: Arena | None = None) -> Engine:
        """Read the weights, and draw those of an adapter that is to be made.

        A delimiter's new row is that of EOS; the tokenizer's EOS is the first that ends a text.
        """
        model = Model.from_pretrained(self.folder, self.dtype, self.device)
        if num_new := self.shape.vocab_size - model.config.vocab_size:
            model = model.grown(num_new, copy_of=self.tokenizer.eos_token_id)
        elif self.delimiter.added:  # a row that the vocabulary is padded with, which nothing has trained
            model.copy_row(self.tokenizer.eos_token_id, self.delimiter.id)
        if self.lora is not None and model.adapter is None:
            model = model.with_adapter(self.lora)
            model.adapter.reset(config.seed)
        eos_ids = tuple(dict.fromkeys([self.tokenizer.eos_token_id, *model.eos_ids]))
        return Engine(
            model, delimiter_id=self.delimiter.id, eos_id=eos_ids, max_cache_bytes=cache_bytes,
            max_repeated=config.max_repeated_tokens or 0, arena=arena,
        )  # fmt: skip

    def plan(self, config: SamplingFields) -> MemoryPlan:
        """The memory of sampling and scoring with resolved lengths; UserError where it cannot fit."""
        sizes = Sizes(
            config.max_prompt_length, config.max_trace_length, config.max_answer_length, config.num_generations
        )
        return plan_inference(self.shape, self.dtype_name, self.device.type, device_memory(self.device), sizes)


def open_source(config: ModelFields) -> Source:
    """Everything of a model but its weights.

    Raises:
        UserError: no such device, model, tokenizer or delimiter, or they do not belong together.
    """
    device = choose_device(config.device)
    folder = MODEL_DIR if config.model_name_or_path is None else model_folder(config.model_name_or_path)
    lora = read_lora(folder)
    base = folder if lora is None else base_folder(folder, lora)
    shape = ModelConfig.from_hf(read_config(base))
    tokenizer_folder = folder if has_tokenizer(folder) else base
    tokenizer = load_tokenizer(str(tokenizer_folder))
    check_vocabulary(tokenizer, shape.vocab_size)
    delimiter = choose_delimiter(tokenizer, config.delimiter, may_add=not getattr(config, "use_peft", False))
    shape = shape.grown(max(0, delimiter.id + 1 - shape.vocab_size))
    dtype = choose_dtype(config.dtype, device)
    return Source(folder, tokenizer_folder, lora, device, dtype, shape, tokenizer, delimiter)


def read_shape(name: str | None) -> ModelConfig:
    """A model's shape from its config.json alone, which is all that is downloaded of a hub id."""
    if name is None or Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        folder = MODEL_DIR if name is None else model_folder(name)
        lora = read_lora(folder)
        return ModelConfig.from_hf(read_config(folder if lora is None else base_folder(folder, lora)))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return ModelConfig.from_hf(read_config(Path(hf_hub_download(name, "config.json")).parent))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {name}: neither a folder here nor a hub id that can be reached ({reason})") from None


def read_adapter(name: str | None) -> Lora | None:
    """The adapter that a folder here holds; None where it holds none."""
    return None if name is None else read_lora(Path(name).expanduser())


def choose_scale(config, device: torch.device) -> Scale:
    """Sizes for the starter on its tasks, for CUDA or for a CPU."""
    if config.model_name_or_path is None and getattr(config, "dataset_name", None) is None:
        return SCALES["starter"]
    return SCALES[device.type]


def choose_device(name: str, must_be_here: bool = True) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: another name, or a device that must be here and is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; valid: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; valid: auto, cpu, cuda, cuda:N")
    if must_be_here and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; auto: bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def device_memory(device: torch.device) -> int:
    """Bytes that a device has: all of them, not those that are free, so that the same run gets the same plan."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine if limit == "max" else min(machine, int(limit))
