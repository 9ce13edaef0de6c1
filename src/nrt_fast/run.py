"""Everything a run is made of, read and checked before the first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nrt_fast import checkpoint
from nrt_fast.config import Objective, TrainConfig
from nrt_fast.data import Data, Delimiter, Limits, Order, check_vocabulary, choose_delimiter, load_data, load_tokenizer
from nrt_fast.engine import MAX_CACHE_BYTES, Engine
from nrt_fast.model import Model
from nrt_fast.model.model import model_folder
from nrt_fast.optim import AdamW
from nrt_fast.resolve import SCALES, Scale, resolve_lengths, resolve_output_dir, resolve_steps
from nrt_fast.starter import MODEL_DIR
from nrt_fast.trackers import find_trackers
from nrt_fast.types import Example, UserError

EMA_DECAY = 0.999
# Fields that may change when a run goes on: they do not decide what its steps compute.
FREE_FIELDS = {
    "output_dir", "max_steps", "num_train_epochs", "max_tokens_per_batch", "save_steps", "save_total_limit",
    "logging_steps", "report_to", "resume_from_checkpoint",
}  # fmt: skip


class WeightAverage:
    """Exponential moving average of a model's weights.

    Attributes:
        model: has the averaged weights, in the model's own dtype.
        flat: the same in fp32, where a step of a thousandth is not rounded away.
    """

    def __init__(self, model: Model):
        self.model = model.clone()
        self.flat = self.model.weights.flat.float()

    def update(self, flat: Tensor) -> None:
        """Take in the weights after an optimiser step."""
        self.load(self.flat.lerp(flat.float(), 1 - EMA_DECAY))

    def load(self, flat: Tensor) -> None:
        """Set the average."""
        self.flat.copy_(flat)
        self.model.weights.flat.copy_(self.flat)


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        config: without a field left open, but for those that are None by meaning.
        objective: the choices of the method.
        source: folder of the initial model.
        frozen: initial weights (frozen baseline, KL), or None where nothing reads them.
        ema: averaged weights (ema baseline), or None.
        frozen_logprobs: log b under the frozen weights by uid, each computed once.
        noise: measured noise of the reward.
    """

    config: TrainConfig
    objective: Objective
    source: Path
    tokenizer: Any
    delimiter: Delimiter
    data: Data
    order: Order
    model: Model
    engine: Engine
    optimizer: AdamW
    frozen: Model | None
    ema: WeightAverage | None
    frozen_logprobs: dict[int, Tensor] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide the result."""
        return {key: value for key, value in asdict(self.config).items() if key not in FREE_FIELDS}

    def take(self) -> list[Example]:
        """The next step's examples."""
        return [self.data.train[index] for index in self.order.take(self.config.prompts_per_step)]

    def save_model(self, folder: Path) -> None:
        """Model and tokenizer in Hugging Face layout."""
        self.model.save_pretrained(folder)
        checkpoint.save_tokenizer(self.tokenizer, self.source, self.delimiter.added, folder)

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds beside the model, by file name."""
        files = {"optimizer": self.optimizer.state()}
        if self.ema is not None:
            files["ema"] = {"flat": self.ema.flat}
        if self.frozen is not None:
            files["frozen"] = {"flat": self.frozen.weights.flat}
        if self.frozen_logprobs:
            files["frozen_logprobs"] = {str(uid): log_b for uid, log_b in self.frozen_logprobs.items()}
        return files

    def restore(self, folder: Path) -> dict[str, Any]:
        """Take over a checkpoint; returns its state.

        Raises:
            UserError: it is of another model or objective.
        """
        state, tensors = checkpoint.load(folder)
        missing = self.state_tensors().keys() - tensors.keys()
        if missing:
            raise UserError(f"checkpoint {folder} has no {min(missing)}.safetensors: it is of another objective")
        self.model.load(folder)
        self.optimizer.load_state(tensors["optimizer"])
        if self.ema is not None:
            self.ema.load(tensors["ema"]["flat"])
        if self.frozen is not None:
            self.frozen.weights.flat.copy_(tensors["frozen"]["flat"])
        self.frozen_logprobs = {int(uid): log_b for uid, log_b in tensors.get("frozen_logprobs", {}).items()}
        self.order.load_state_dict(state["order"])
        self.noise = state["noise"]
        return state


def prepare(config: TrainConfig) -> Run:
    """Read model and data, decide what the configuration leaves open, allocate.

    Raises:
        UserError: anything that cannot work, before anything is written.
    """
    config.check()
    find_trackers(config)
    objective = config.resolved_objective()
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    source = MODEL_DIR if config.model_name_or_path is None else model_folder(config.model_name_or_path)
    model = Model.from_pretrained(source, dtype, device)
    tokenizer = load_tokenizer(str(source))
    check_vocabulary(tokenizer, model.config.vocab_size)
    delimiter = choose_delimiter(tokenizer, config.delimiter)
    if delimiter.id >= model.config.vocab_size:
        model = model.grown(delimiter.id + 1 - model.config.vocab_size, copy_of=tokenizer.eos_token_id)
    scale = _scale(config, device)
    num_heldout = scale.heldout if config.num_eval_prompts is None else config.num_eval_prompts
    config = resolve_lengths(config, scale, model.config.max_position_embeddings)
    limits = Limits(
        config.max_prompt_length, config.max_answer_length, config.overlong_prompts, config.overlong_answers
    )
    data = load_data(config, tokenizer, limits, num_heldout)
    config = resolve_steps(config, scale, len(data.train))
    config = replace(
        config,
        num_eval_prompts=len(data.heldout),
        num_generations=0 if config.objective == "sft" else config.num_generations,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        output_dir=resolve_output_dir(config),
    )
    eos_ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *model.eos_ids]))
    return Run(
        config=config,
        objective=objective,
        source=source,
        tokenizer=tokenizer,
        delimiter=delimiter,
        data=data,
        order=Order(data.num_per_dataset, config.dataset_weights, config.seed),
        model=model,
        engine=Engine(model, delimiter_id=delimiter.id, eos_id=eos_ids, max_cache_bytes=_cache_bytes(device)),
        optimizer=_optimizer(model, config),
        frozen=model.clone() if objective.baseline == "frozen" or objective.beta else None,
        ema=WeightAverage(model) if objective.baseline == "ema" else None,
    )


def _scale(config: TrainConfig, device: torch.device) -> Scale:
    if config.model_name_or_path is None and config.dataset_name is None:
        return SCALES["starter"]
    return SCALES["cuda" if device.type == "cuda" else "cpu"]


def _optimizer(model: Model, config: TrainConfig) -> AdamW:
    weights = model.weights
    return AdamW(
        weights.flat, weights.leaves.values(), weights.num_matrix_elements, (config.adam_beta1, config.adam_beta2),
        config.adam_epsilon, config.weight_decay,
    )  # fmt: skip


def _cache_bytes(device: torch.device) -> int:
    # A share of all memory, not of what is free: the same waves every time.
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else MAX_CACHE_BYTES


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; valid: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; valid: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
