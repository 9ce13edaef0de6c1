"""Checks of a configuration that need neither the data nor the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nrt_fast.health import ALARMS
from nrt_fast.types import UserError, did_you_mean

if TYPE_CHECKING:
    from nrt_fast.config import (
        DataFields,
        EvalConfig,
        ExportConfig,
        GenerateConfig,
        HeldoutFields,
        Objective,
        ReportConfig,
        ScoreConfig,
        TrainConfig,
    )

AT_LEAST = {
    "num_eval_prompts": 0, "max_prompt_length": 1, "max_trace_length": 1, "max_answer_length": 2,
    "max_repeated_tokens": 1, "answer_coef": 0, "format_coef": 0,
    "std_floor": 0, "beta": 0, "entropy_coef": 0, "prompts_per_step": 1, "prompts_per_minibatch": 1,
    "num_generations": 1, "max_tokens_per_batch": 1, "warmup_steps": 0, "weight_decay": 0, "adam_beta1": 0,
    "adam_beta2": 0, "max_steps": 1, "seed": 0, "save_steps": 1, "save_total_limit": 1, "logging_steps": 1,
    "eval_steps": 0, "num_prompts": 1, "num_processes": 1, "nodes": 1,
    "gpus": 1, "lora_r": 1, "lora_alpha": 1,
}  # fmt: skip
ABOVE = dict.fromkeys(
    ("epsilon", "epsilon_high", "temperature", "learning_rate", "adam_epsilon", "max_grad_norm", "num_train_epochs",
     "device_memory_gib", "ddp_timeout", "bus_bandwidth_gb_s"), 0,
)  # fmt: skip
METRICS = ("exact", "normalised", "math")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RUNS = 8  # in one report
BELOW = {"epsilon": 1, "adam_beta1": 1, "adam_beta2": 1, "seed": 2**63}


def check_config(config: TrainConfig) -> None:
    """Raise what ``TrainConfig.check`` says."""
    _check_ranges(config)
    objective = config.resolved_objective()
    for problem in _contradictions(config, objective):
        raise UserError(problem)
    _refuse_idle(config, _idle_fields(config, objective))


def check_score(config: ScoreConfig) -> None:
    """Raise what ``ScoreConfig.check`` says."""
    _check_heldout(config)


def check_eval(config: EvalConfig) -> None:
    """Raise what ``EvalConfig.check`` says."""
    _check_heldout(config, may_be_zero=("temperature",))  # greedy
    if config.temperature == 0 and config.num_generations > 1:
        raise UserError(f"num_generations {config.num_generations} cannot take effect: at temperature 0 all are equal")
    names = config.metric_names
    if unknown := [name for name in names if name not in METRICS]:
        guess = did_you_mean(unknown[0], METRICS)
        raise UserError(f"metrics: {unknown[0]!r} is unknown; valid: some of {', '.join(METRICS)}{guess}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"metrics is {config.metrics!r}; one or more of {', '.join(METRICS)} are expected, each once")


def _check_heldout(config: HeldoutFields, may_be_zero: tuple[str, ...] = ()) -> None:
    _check_ranges(config, may_be_zero)
    for problem in _data_problems(config):
        raise UserError(problem)
    if config.dataset_name is None and (config.prompt_field or config.answer_field):
        name = "prompt_field" if config.prompt_field else "answer_field"
        raise UserError(f"{name} cannot take effect: the built-in tasks name theirs")


def check_generate(config: GenerateConfig) -> None:
    """Raise what ``GenerateConfig.check`` says."""
    _check_ranges(config, may_be_zero=("temperature",))  # greedy
    if (config.question is None) == (config.input_file is None):
        raise UserError('one of a question and input_file is needed: nrt-fast generate "How many?" or --input_file F')
    if config.question is not None and not config.question.strip():
        raise UserError("the question is empty")
    if config.prompt_field and (config.input_file is None or config.input_file.endswith(".txt")):
        raise UserError("prompt_field cannot take effect: there are no rows with fields")


def check_export(config: ExportConfig) -> None:
    """Raise what ``ExportConfig.check`` says."""
    for name in ("model_name_or_path", "output_dir"):
        if getattr(config, name) is None:
            raise UserError(f"{name} is needed: nrt-fast export --model_name_or_path runs/demo/final --output_dir NEW")
    _refuse_idle(config, [_idle_hub(config)])


def check_report(config: ReportConfig) -> None:
    """Raise what ``ReportConfig.check`` says."""
    if not config.folders:
        raise UserError("a run's folder is needed: nrt-fast report runs/demo")
    if len(config.folders) > MAX_RUNS:
        raise UserError(f"{len(config.folders)} runs; at most {MAX_RUNS} can be told apart by colour")
    folders = [Path(run).expanduser().resolve() for run in config.folders]
    for run, folder in zip(config.folders, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{run} is there twice; each run once")


def _check_ranges(config, may_be_zero: tuple[str, ...] = ()) -> None:
    for name, value in vars(config).items():
        if name in may_be_zero:
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}; it should be at least 0")
        elif isinstance(value, (int, float)) and (problem := _range_problem(name, value)):
            raise UserError(f"{name} is {value}; it should be {problem}")


def _range_problem(name: str, value: float) -> str | None:
    if not math.isfinite(value):
        return "finite"
    if value < AT_LEAST.get(name, value):
        return f"at least {AT_LEAST[name]}"
    if name in ABOVE and value <= ABOVE[name]:
        return f"above {ABOVE[name]}"
    return f"under {BELOW[name]}" if name in BELOW and value >= BELOW[name] else None


def _data_problems(config: DataFields) -> Iterator[str]:
    if config.dataset_name is not None and not config.dataset_names:
        yield "dataset_name is empty; leave it out for the built-in tasks"


def _contradictions(config: TrainConfig, objective: Objective) -> Iterator[str]:
    yield from _data_problems(config)
    if config.dataset_weights is not None:
        if len(config.dataset_weights) != len(config.dataset_names):
            yield f"dataset_weights has {len(config.dataset_weights)} numbers for {len(config.dataset_names)} data sets"
        if not all(0 < weight < math.inf for weight in config.dataset_weights):
            yield f"dataset_weights are {config.dataset_weights}; each should be above 0"
    if objective.format_term == "reward" and objective.format_coef > 1:
        yield f"format_coef is {objective.format_coef}; as a share of the reward it should be at most 1"
    if config.objective != "sft" and objective.trace_loss != "none" and config.num_generations < 2:
        yield f"num_generations is {config.num_generations}; an advantage compares at least 2 traces"
    if objective.baseline == "none" and objective.reward in ("ws_inv", "ws_log", "r3"):
        yield f"reward {objective.reward} is measured against a baseline; baseline is none"
    if objective.baseline == "none" and objective.reward_clip != "none":
        yield f"reward_clip {objective.reward_clip} is a clip at a baseline; baseline is none"
    yield from loss_problems(objective, config.objective == "sft")
    for name in config.stop_alarms:
        if name not in ALARMS:
            guess = did_you_mean(name, ALARMS)
            yield f"stop_on: no alarm is named {name!r}; valid: all, or some of {', '.join(ALARMS)}{guess}"
    unknown = [name for name in config.lora_targets if name not in PROJECTIONS]
    if unknown or (config.lora_target_modules is not None and not config.lora_targets):
        told = f"{unknown[0]!r} is unknown" if unknown else "is empty"
        guess = did_you_mean(unknown[0], PROJECTIONS) if unknown else ""
        yield f"lora_target_modules: {told}; valid: all-linear, or some of {', '.join(PROJECTIONS)}{guess}"


def loss_problems(objective: Objective, is_sft: bool = False) -> Iterator[str]:
    """What is wrong with an objective's loss, in a run of our own or in another trainer."""
    if objective.answer_weight == "reward" and objective.answer_coef and objective.reward in ("logp", "r3"):
        yield (
            f"answer_weight reward unlearns answers where R is negative, as {objective.reward} can be; valid: reward "
            "prob, am, gm, ws_inv or ws_log, or answer_weight fixed or derived"
        )
    if objective.trace_loss == "none" and not objective.answer_coef:
        valid = "answer_coef above 0" + ("" if is_sft else ", or trace_loss cispo, reinforce or ppo")
        yield f"answer_coef is 0 and trace_loss none: neither answers nor traces train; valid: {valid}"


def _refuse_idle(config: TrainConfig | ExportConfig, rows: Iterable[tuple[str, bool, str]]) -> None:
    """UserError for the first field that is given and idle; rows are (fields, whether they are idle, why)."""
    for names, idle, reason in rows:
        given = [name for name in names.split() if getattr(config, name) != getattr(type(config), name)]
        if idle and given:
            raise UserError(f"{given[0]} cannot take effect: {reason}")


def _idle_hub(config: TrainConfig | ExportConfig) -> tuple[str, bool, str]:
    return "hub_model_id hub_private_repo", not config.push_to_hub, "push_to_hub is false"


def _idle_fields(config: TrainConfig, objective: Objective) -> Iterator[tuple[str, bool, str]]:
    """(fields, whether they are idle, why)."""
    builtin = config.dataset_name is None
    yield "prompt_field answer_field", builtin and config.eval_dataset_name is None, "the built-in tasks name theirs"
    yield "dataset_eval_split", config.eval_dataset_name is None, "there is no eval_dataset_name"
    yield "eval_dataset_name", config.num_eval_prompts == 0, "num_eval_prompts is 0"
    yield (
        "reward baseline reward_clip advantage trace_loss answer_weight format_coef reward_scale std_floor epsilon"
        " epsilon_high drop_cut_reward beta entropy_coef num_generations temperature max_trace_length"
        " max_repeated_tokens stop_on",
        config.objective == "sft",
        "objective sft has no traces",
    )
    no_trace_loss = objective.trace_loss == "none"
    yield "advantage std_floor epsilon epsilon_high entropy_coef beta", no_trace_loss, "trace_loss is none"
    yield "epsilon epsilon_high", objective.trace_loss == "reinforce", "trace_loss reinforce clips no ratio"
    yield "answer_weight", objective.answer_coef == 0, "answer_coef is 0"
    yield "lora_r lora_alpha lora_target_modules use_rslora", not config.use_peft, "use_peft is false"
    yield _idle_hub(config)
    weighted = objective.reward in ("ws_inv", "ws_log")
    yield "reward_scale", not weighted, f"reward {objective.reward} has no weights to sum; ws_inv and ws_log have"
    reads_b = weighted or objective.reward == "r3" or objective.reward_clip != "none" or objective.drop_cut_reward
    unused = not reads_b and objective.baseline != "none"
    yield "baseline", unused, f"reward {objective.reward} without a clip reads none"
