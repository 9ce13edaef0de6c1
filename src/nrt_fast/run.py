"""Everything a run is made of, read and checked before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nrt_fast import checkpoint, distributed
from nrt_fast.arena import Arena
from nrt_fast.communication import Communication
from nrt_fast.config import EstimateConfig, Objective, TrainConfig
from nrt_fast.data import Data, Delimiter, Limits, Order, load_data
from nrt_fast.engine import Engine
from nrt_fast.hub import check_account
from nrt_fast.model import Model
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.lora import Lora
from nrt_fast.model.peft_folder import check_peft
from nrt_fast.optim import AdamW
from nrt_fast.plan import GIB, MemoryPlan, Sizes, num_parameters, plan_training
from nrt_fast.resolve import Scale, resolve_lengths, resolve_output_dir, resolve_steps
from nrt_fast.source import (
    choose_device,
    choose_dtype,
    choose_scale,
    device_memory,
    open_source,
    read_adapter,
    read_shape,
)
from nrt_fast.starter import MODEL_DIR
from nrt_fast.trackers import find_trackers
from nrt_fast.types import Example, UserError

EMA_DECAY = 0.999
AVERAGED_AT_ONCE = 1 << 26  # weights: a copy of all of them would be outside the memory plan
# Fields that may change when a run goes on. They do not decide what its steps compute, but for the run's length: a rate
# that decays, or warms up for a share of all steps, follows it, and the loop says so.
FREE_FIELDS = {
    "output_dir", "max_steps", "num_train_epochs", "max_tokens_per_batch", "recompute", "save_steps",
    "save_total_limit", "logging_steps", "stop_on", "report_to", "resume_from_checkpoint", "num_processes",
    "ddp_timeout", "push_to_hub", "hub_model_id", "hub_private_repo",
}  # fmt: skip


class WeightAverage:
    """Exponential moving average of a model's weights.

    Attributes:
        model: has the averaged weights, in the model's own dtype.
        flat: the same in fp32, where a step of a thousandth is not rounded away.
    """

    def __init__(self, model: Model):
        self.model = model.clone()
        self.flat = self.model.trained.flat.float()

    def update(self, flat: Tensor) -> None:
        """Take in the weights after an optimiser step."""
        parts = (x.split(AVERAGED_AT_ONCE) for x in (self.flat, flat, self.model.trained.flat))
        for average, weights, rounded in zip(*parts, strict=True):
            rounded.copy_(average.lerp_(weights.float(), 1 - EMA_DECAY))

    def load(self, flat: Tensor) -> None:
        """Set the average."""
        self.flat.copy_(flat)
        self.model.trained.flat.copy_(self.flat)


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        config: without a field left open, but for those that are None by meaning.
        given: the fields that its user set.
        objective: the choices of the method.
        source: folder of the tokenizer.
        frozen: initial weights (frozen baseline, KL), or None where nothing reads them.
        ema: averaged weights (ema baseline), or None.
        frozen_logprobs: log b under the frozen weights by uid, each computed once.
        noise: measured noise of the reward.
    """

    config: TrainConfig
    given: dict[str, Any]
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

    @property
    def _initial(self) -> Tensor | None:
        """Numbers of the frozen model; None where it is what the adapter stands on, and is never copied."""
        if self.frozen is None or self.frozen.trained is self.model.weights:
            return None
        return self.frozen.trained.flat

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds beside the model and the optimizer's state, by file name."""
        files, initial = {}, self._initial
        if self.ema is not None:
            files["ema"] = {"flat": self.ema.flat}
        if initial is not None:
            files["frozen"] = {"flat": initial}
        if lengths := self.engine.trace_lengths:
            # They order a rollout, and on CUDA a batch's rows are rounded as its order and size have it.
            uids, values = torch.tensor(list(lengths)), torch.tensor(list(lengths.values()), dtype=torch.float64)
            files["trace_lengths"] = {"uids": uids, "lengths": values}
        if self.frozen_logprobs:
            files["frozen_logprobs"] = {str(uid): log_b for uid, log_b in self.frozen_logprobs.items()}
        return files

    def restore(self, folder: Path | str) -> dict[str, Any]:
        """Take over a checkpoint, whatever the number of ranks that wrote it; returns its state.

        Raises:
            UserError: it is of another model or objective.
        """
        folder = Path(folder)
        state, tensors = checkpoint.load(folder)
        missing = self.state_tensors().keys() - tensors.keys()
        if missing:
            raise UserError(f"checkpoint {folder} has no {min(missing)}.safetensors: it is of another objective")
        self.model.load(folder)
        self.optimizer.load_state(checkpoint.load_slices(folder, self.optimizer.ranges()))
        if self.ema is not None:
            self.ema.load(tensors["ema"]["flat"])
        if self._initial is not None:
            self._initial.copy_(tensors["frozen"]["flat"])
        self.frozen_logprobs = {int(uid): log_b for uid, log_b in tensors.get("frozen_logprobs", {}).items()}
        lengths = {name: tensor.tolist() for name, tensor in tensors.get("trace_lengths", {}).items()}
        self.engine.trace_lengths = dict(zip(lengths.get("uids", []), lengths.get("lengths", []), strict=True))
        self.order.load_state_dict(state["order"])
        self.noise = state["noise"]
        return state


def prepare(config: TrainConfig, say: Callable[[str], None] = lambda text: None, cache_bytes: int | None = None) -> Run:
    """Read model and data, decide what the configuration leaves open, tell the memory of it all, allocate.

    Args:
        cache_bytes: keys and values, or gradients in their turn; what the plan leaves if absent.

    Raises:
        UserError: anything that cannot work, before anything is written.
    """
    config.check()
    given = config.given
    find_trackers(config)
    distributed.on_first(check_account, config)
    if config.use_peft:
        check_peft()
    objective = config.resolved_objective()
    source = open_source(config)
    config, is_new = resolve_lora(config, source.lora), source.lora is None
    source = replace(source, lora=source.lora or lora_of(config))
    scale = choose_scale(config, source.device)
    config = resolve_lengths(config, scale, source.shape.max_position_embeddings)
    limits = Limits(
        config.max_prompt_length, config.max_answer_length, config.overlong_prompts, config.overlong_answers
    )
    data = load_data(config, source.tokenizer, limits, scale.heldout)
    device_bytes, num_ranks = memory_of_each(source.device), distributed.size()
    plan = plan_run(config, scale, source.shape, source.dtype, source.device, device_bytes, num_ranks)
    say(str(plan))
    config = resolve_steps(config, scale, len(data.train))
    config = replace(
        config,
        num_eval_prompts=len(data.heldout),
        num_generations=0 if config.objective == "sft" else config.num_generations,
        max_tokens_per_batch=min(config.max_tokens_per_batch, plan.sizes.batch_tokens),
        recompute=plan.sizes.recompute,
        adam_moments_dtype=plan.sizes.moments,
        dtype=source.dtype_name,
        device=str(source.device),
        num_processes=distributed.size(),
        output_dir=resolve_output_dir(config),
        resume_from_checkpoint=os.path.expanduser(config.resume_from_checkpoint),
    )
    cache_bytes = plan.cache_bytes if cache_bytes is None else cache_bytes
    arena = Arena(cache_bytes, source.device)
    engine = source.engine(config, cache_bytes, arena)
    model = engine.model
    return Run(
        config=config,
        given=given,
        objective=objective,
        source=source.tokenizer_folder,
        tokenizer=source.tokenizer,
        delimiter=source.delimiter,
        data=data,
        order=Order(data.num_per_dataset, config.dataset_weights, config.seed, data.digests),
        model=model,
        engine=engine,
        optimizer=_optimizer(model, config, arena),
        frozen=_frozen(model, is_new) if objective.baseline == "frozen" or objective.beta else None,
        ema=WeightAverage(model) if objective.baseline == "ema" else None,
    )


def memory_of_each(device: torch.device) -> int:
    """Bytes of a device that a rank may plan with: those of a CPU are the ranks' of its host together."""
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return distributed.least(device_memory(device) // shared)


def resolve_lora(config: TrainConfig, found: Lora | None) -> TrainConfig:
    """The adapter's fields, from the adapter that the model's folder holds where it is one.

    Raises:
        UserError: fields that contradict the folder.
    """
    name, names = config.model_name_or_path, ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora")
    if not config.use_peft:
        if found is not None:
            raise UserError(
                f"model_name_or_path {name} is a LoRA adapter: --use_peft true goes on training it; nrt-fast export "
                "--merge_lora true makes it a model whose weights can all be trained"
            )
        return config
    if found is None:
        values = config.lora_r or 16, config.lora_alpha or 32, config.lora_targets, bool(config.use_rslora)
        return replace(config, **dict(zip(names, values, strict=True)))
    if given := [field for field in names if getattr(config, field) is not None]:
        raise UserError(f"{given[0]} cannot take effect: model_name_or_path {name} is an adapter that has its own")
    values = found.rank, found.alpha, list(found.targets), found.use_rslora
    return replace(config, **dict(zip(names, values, strict=True)))


def lora_of(config: TrainConfig) -> Lora | None:
    """The adapter that a resolved configuration asks for."""
    if not config.use_peft:
        return None
    targets, base_name = tuple(config.lora_target_modules), config.model_name_or_path or str(MODEL_DIR)
    return Lora(config.lora_r, config.lora_alpha, targets, config.use_rslora, base_name)


def _frozen(model: Model, is_new: bool) -> Model:
    """The model as it starts; a new adapter changes nothing yet."""
    return model.without_adapter() if model.adapter is not None and is_new else model.clone()


def plan_run(
    config: TrainConfig, scale: Scale, shape: ModelConfig, dtype: torch.dtype, device: torch.device, device_bytes: int,
    num_ranks: int = 1,
) -> MemoryPlan:  # fmt: skip
    """The memory of a run whose lengths are resolved, on each of its ranks; UserError where it cannot fit."""
    objective, lora = config.resolved_objective(), lora_of(config)
    ema, frozen = objective.baseline == "ema", objective.baseline == "frozen" or bool(objective.beta)
    sizes = Sizes(
        config.max_prompt_length,
        config.max_trace_length,
        config.max_answer_length,
        0 if config.objective == "sft" else config.num_generations,
        config.max_tokens_per_batch or scale.tokens_per_batch,
        num_copies=ema + (frozen and lora is None),
        num_fp32_copies=int(ema),
        recompute=config.recompute,
        moments=config.adam_moments_dtype,
        adapter=0 if lora is None else lora.num_parameters(shape),
        num_ranks=num_ranks,
    )
    if device.type == "cpu" and sizes.moments not in (None, "float32"):
        raise UserError(f"adam_moments_dtype {sizes.moments} is for CUDA; on a CPU the moments are fp32")
    name = str(dtype).removeprefix("torch.")
    return plan_training(shape, name, device.type, device_bytes, sizes, shrink=config.max_tokens_per_batch is None)


def estimate(config: EstimateConfig) -> MemoryPlan:
    """Print the memory of a run and the tokens of a step, from the model's configuration alone, and what several ranks
    say to one another. A device whose memory is told need not be here.

    Raises:
        UserError: bad input, or a run that cannot fit.
    """
    config.check()
    told = config.device_memory_gib
    device = choose_device(config.device, must_be_here=told is None)
    config = resolve_lora(config, read_adapter(config.model_name_or_path))
    scale, shape = choose_scale(config, device), read_shape(config.model_name_or_path)
    config = resolve_lengths(config, scale, shape.max_position_embeddings)
    device_bytes = device_memory(device) if told is None else int(told * GIB)
    dtype = choose_dtype(config.dtype, device)
    plan = plan_run(config, scale, shape, dtype, device, device_bytes, config.num_ranks)
    print(plan)
    print(_step_tokens(config, scale))
    if config.num_ranks > 1:
        num_prompts = config.prompts_per_step or scale.prompts_per_step
        num_updates = -(-num_prompts // (config.prompts_per_minibatch or num_prompts))
        parameters, name = plan.sizes.adapter or num_parameters(shape), str(dtype).removeprefix("torch.")
        bandwidth = config.bus_bandwidth_gb_s
        print(Communication(config.num_ranks, name, parameters, num_updates, num_prompts, plan.sizes, bandwidth))
    return plan


def _step_tokens(config: EstimateConfig, scale: Scale) -> str:
    """The most tokens of one step; how long they take is measured, never told from here."""
    prompts, sft = config.prompts_per_step or scale.prompts_per_step, config.objective == "sft"
    traces, length = (1, 0) if sft else (config.num_generations, config.max_trace_length)
    trained = prompts * (config.max_prompt_length + traces * (length + 1 + config.max_answer_length))
    return (
        f"a step of {prompts:,} prompts{'' if sft else f' x {traces} traces'}: at most {prompts * traces * length:,} "
        f"tokens sampled and {trained:,} trained; nrt-fast train --dry_run runs one and tells its tokens/s"
    )


def _optimizer(model: Model, config: TrainConfig, arena: Arena) -> AdamW:
    weights = model.trained
    return AdamW(
        weights.flat, weights.leaves.values(), weights.num_matrix_elements, (config.adam_beta1, config.adam_beta2),
        config.adam_epsilon, config.weight_decay, getattr(torch, config.adam_moments_dtype), arena,
    )  # fmt: skip
