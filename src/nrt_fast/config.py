"""Configuration: one flat frozen dataclass, and the presets of the method.

Parsed before torch is imported, so this module imports the standard library only. Names are TRL's where the meaning is
TRL's. A field that is None is derived from the model, the data and the machine, and the derived value is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from nrt_fast.config_checks import (
    PROJECTIONS,
    check_config,
    check_eval,
    check_export,
    check_generate,
    check_report,
    check_score,
)
from nrt_fast.health import ALARMS

Reward = Literal["logp", "prob", "am", "gm", "ws_inv", "ws_log", "r3"]
Baseline = Literal["current", "frozen", "ema", "none"]
RewardClip = Literal["none", "zero", "unit"]
Advantage = Literal["grpo", "dr_grpo", "rloo"]
TraceLoss = Literal["cispo", "reinforce", "ppo", "none"]
AnswerWeight = Literal["fixed", "derived", "reward"]
FormatTerm = Literal["loss", "reward"]
Normalizer = Literal["token", "sequence", "constant"]
RewardScale = Literal["length", "weight"]
Preset = Literal[
    "nrt-ws", "nrt-ws-inv", "nrt-gm", "nrt-am", "nrt-p", "nrt-logp", "nrt-derived", "nrt-release",
    "jepo", "verifree", "rlpr", "r3", "sft",
]  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """What is maximised: sections 2 to 4 of arXiv 2602.11549 with every choice made."""

    reward: Reward = "ws_log"
    baseline: Baseline = "current"
    reward_clip: RewardClip = "zero"
    advantage: Advantage = "grpo"
    trace_loss: TraceLoss = "cispo"
    answer_weight: AnswerWeight = "fixed"
    answer_coef: float = 1.0
    format_coef: float = 0.3
    format_term: FormatTerm = "loss"
    normalizer: Normalizer = "token"
    reward_scale: RewardScale = "length"
    std_floor: float = 0.002
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    drop_cut_reward: bool = False
    beta: float = 0.0
    entropy_coef: float = 0.0


PRESETS: dict[str, Objective] = {
    "nrt-ws": Objective(),
    "nrt-ws-inv": Objective(reward="ws_inv"),
    "nrt-gm": Objective(reward="gm"),
    "nrt-am": Objective(reward="am"),
    "nrt-p": Objective(reward="prob"),
    "nrt-logp": Objective(reward="logp"),
    "nrt-derived": Objective(answer_weight="derived"),
    "nrt-release": Objective(reward_clip="none", std_floor=0.0, normalizer="constant"),
    "jepo": Objective(
        reward="logp", baseline="none", reward_clip="none", advantage="rloo", trace_loss="reinforce", format_coef=0.0
    ),
    "verifree": Objective(
        reward="prob", baseline="none", reward_clip="none", advantage="rloo", trace_loss="reinforce",
        answer_weight="reward", format_coef=0.0,
    ),
    "rlpr": Objective(
        reward="am", baseline="frozen", reward_clip="unit", trace_loss="ppo", epsilon_high=0.27, answer_coef=0.0,
        format_coef=0.1, format_term="reward",
    ),
    "r3": Objective(reward="r3", reward_clip="none"),
    "sft": Objective(
        reward="logp", baseline="none", reward_clip="none", trace_loss="none", format_coef=0.0
    ),
}  # fmt: skip


def split_names(names: list[str] | str) -> list[str]:
    """The names of a list, or of a comma-separated string."""
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)


@dataclass(frozen=True)
class ModelFields:
    """Fields of every command: the model, how it is spoken to, and where it runs."""

    model_name_or_path: str | None = None
    """Hugging Face folder or hub id of a Llama, Mistral, Qwen2 or Qwen3 model; the built-in starter if absent."""
    chat_template_kwargs: dict | None = None
    """Extra arguments of the tokenizer's chat template."""
    delimiter: str | None = None
    """The one token that ends a trace; if absent </think>, else a reserved one of the tokenizer, else a new one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and activations; auto: bfloat16 on CUDA, float32 on CPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto: CUDA where there is one."""


@dataclass(frozen=True)
class SamplingFields:
    """Fields of the commands that sample traces."""

    num_generations: int = 8
    """Traces sampled for each prompt."""
    temperature: float = 1.0
    """Sampling temperature of traces; answers are greedy."""
    max_prompt_length: int | None = None
    """Longest prompt, in tokens."""
    max_trace_length: int | None = None
    """Longest reasoning trace, in tokens, without the delimiter."""
    max_answer_length: int | None = None
    """Longest answer, in tokens, with its EOS."""
    max_repeated_tokens: int | None = None
    """A trace is cut when this many of its last tokens repeat a cycle of at most 32 tokens; never if absent."""
    seed: int = 0
    """Seed of data order and sampling."""


@dataclass(frozen=True)
class DataFields:
    """Fields of the commands that read pairs of question and reference answer."""

    dataset_name: list[str] | str | None = None
    """Paths (.jsonl .json .csv .parquet, also .gz) or hub ids, comma-separated; the built-in tasks if absent."""
    dataset_train_split: str = "train"
    """Split of a hub dataset, or of a folder that has splits."""
    prompt_field: str | None = None
    """Field that holds the question; detected if absent."""
    answer_field: str | None = None
    """Field that holds the reference answer; detected if absent."""
    overlong_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """What happens to prompts over the limit."""
    overlong_answers: Literal["drop", "error"] = "drop"
    """What happens to answers over the limit."""

    @property
    def dataset_names(self) -> list[str]:
        """The names in dataset_name; none for the built-in tasks."""
        return split_names(self.dataset_name or [])


@dataclass(frozen=True)
class HubFields:
    """Fields of the commands that write a model: whether and where it is uploaded."""

    push_to_hub: bool = False
    """Upload the model to the Hugging Face Hub when it is written."""
    hub_model_id: str | None = None
    """Repository: owner/name, or a name of your own account; the name of output_dir if absent."""
    hub_private_repo: bool | None = None
    """Make the repository, if it is new, private; as the account has it if absent."""


@dataclass(frozen=True)
class TrainConfig(HubFields, DataFields, SamplingFields, ModelFields):
    """Every field of ``nrt-fast train``."""

    dataset_weights: list[float] | None = None
    """Sampling weight of each dataset; in proportion to their rows if absent."""
    eval_dataset_name: list[str] | str | None = None
    """Held-out data; the last num_eval_prompts rows of the shuffled training data are held out if absent."""
    dataset_eval_split: str | None = None
    """Split of eval_dataset_name; dataset_train_split if absent."""
    num_eval_prompts: int | None = None
    """Held-out items used before and after training; of few rows at most a tenth if absent."""

    objective: Preset = "nrt-ws"
    """Preset of the method; the fields below change single choices of it."""
    reward: Reward | None = None
    """How the answer's probabilities make one reward."""
    baseline: Baseline | None = None
    """Weights that read the answer without a trace."""
    reward_clip: RewardClip | None = None
    """zero: max(0, R - R_base); unit: R - R_base clipped to [0, 1]; none."""
    advantage: Advantage | None = None
    """Group-relative advantage."""
    trace_loss: TraceLoss | None = None
    """Policy-gradient form of the trace tokens."""
    answer_weight: AnswerWeight | None = None
    """Weight of an answer token in the answer loss."""
    answer_coef: float | None = None
    """Coefficient of the answer loss."""
    format_coef: float | None = None
    """Coefficient of the delimiter's loss (or reward) at the end of traces that did not end with it."""
    normalizer: Normalizer | None = None
    """The one number that the step's summed loss is divided by."""
    reward_scale: RewardScale | None = None
    """Whether a weighted reward is divided by the answer's length or by the sum of its weights."""
    std_floor: float | None = None
    """Groups whose reward std is under it, or under 3 x noise, have no signal; 0.002, and 0 turns both bounds off."""
    epsilon: float | None = None
    """Lower clip of the importance ratio: 1 - epsilon."""
    epsilon_high: float | None = None
    """Upper clip of the importance ratio: 1 + epsilon_high."""
    drop_cut_reward: bool | None = None
    """Give traces that hit the limit the reward of an empty trace."""
    beta: float | None = None
    """Coefficient of the KL term to the initial weights."""
    entropy_coef: float | None = None
    """Coefficient of the entropy bonus on trace tokens."""

    prompts_per_step: int | None = None
    """Prompts sampled in one step."""
    prompts_per_minibatch: int | None = None
    """Prompts in one optimiser step; all of the step's prompts if absent."""
    max_tokens_per_batch: int | None = None
    """Tokens in one packed micro-batch; changes memory and speed, not the result."""
    recompute: Literal["none", "selective", "full"] | None = None
    """What the backward pass computes again to save memory: selective, all but products; full, whole layers."""
    learning_rate: float | None = None
    """Peak learning rate; 2e-6, of the starter on its own tasks 3e-4; ten times that with use_peft."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after the warm-up."""
    warmup_steps: float | None = None
    """Warm-up, in steps; under 1, as a share of all steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adam_epsilon: float = 1e-15
    """AdamW's epsilon."""
    adam_moments_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of AdamW's moments on CUDA; the first that fits, if absent. Weights keep an fp32 master with any."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_steps: int | None = None
    """Steps to run; overrides num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the data."""

    use_peft: bool = False
    """Train a LoRA adapter and leave the weights as they are; a PEFT adapter as model goes on from there."""
    lora_r: int | None = None
    """Rank of the adapter; 16."""
    lora_alpha: int | None = None
    """The adapter's change is scaled by lora_alpha / lora_r; 32."""
    lora_target_modules: list[str] | str | None = None
    """Projections with an adapter: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj; all-linear: all of them."""
    use_rslora: bool | None = None
    """Scale by lora_alpha / sqrt(lora_r) instead; false."""

    output_dir: str | None = None
    """Folder of the run; runs/<model>-<data>-<objective>, -lora behind it for an adapter; the demo's is runs/demo."""
    save_steps: int | None = None
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    logging_steps: int = 1
    """Steps between console lines; metrics.jsonl has every step."""
    eval_steps: int | None = None
    """Steps between held-out gain measurements; 0: only before and after."""
    stop_on: list[str] | str | None = None
    """Alarms at which the run stops, saved (comma-separated; docs/health.md): all, or some of their names."""
    report_to: list[str] | str = "none"
    """Trackers beside metrics.jsonl: trackio, wandb, tensorboard (comma-separated)."""
    num_processes: int = 1
    """Processes on this machine that train together, one for each GPU; torchrun starts them on several machines."""
    ddp_timeout: float = 1800.0
    """Seconds that a process waits for another one before the run ends and tells which."""
    resume_from_checkpoint: str = "auto"
    """auto: the newest complete checkpoint of output_dir; false; or one's path, until output_dir has a later one."""

    def check(self) -> None:
        """Refuse values out of range, choices that contradict one another, and fields that could have no effect.

        It is meant for a configuration as its user wrote it: derived values would count as written ones.

        Raises:
            UserError: names the field, and what would be valid.
        """
        check_config(self)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def stop_alarms(self) -> list[str]:
        """The names in stop_on, all spelt out."""
        names = split_names(self.stop_on or [])
        return list(ALARMS) if names == ["all"] else names

    @property
    def lora_targets(self) -> list[str]:
        """The names in lora_target_modules, all-linear spelt out, in the model's order where they are known."""
        names = split_names("all-linear" if self.lora_target_modules is None else self.lora_target_modules)
        if names == ["all-linear"]:
            return list(PROJECTIONS)
        return sorted(set(names), key=lambda name: (PROJECTIONS.index(name) if name in PROJECTIONS else -1, name))

    def resolved_objective(self) -> Objective:
        """The preset with this config's own choices on top of it."""
        chosen = {f.name: getattr(self, f.name) for f in fields(Objective) if hasattr(self, f.name)}
        return replace(PRESETS[self.objective], **{k: v for k, v in chosen.items() if v is not None})


@dataclass(frozen=True)
class EstimateConfig(TrainConfig):
    """Every field of ``nrt-fast estimate``: those of a run, and a machine that need not be here."""

    device_memory_gib: float | None = None
    """Memory of the device; that of the device chosen if absent."""
    nodes: int = 1
    """Machines that train together."""
    gpus: int | None = None
    """Processes on each, one for each GPU; num_processes if absent."""
    bus_bandwidth_gb_s: float | None = None
    """GB/s between all of them, as nccl-tests' all_gather_perf measures (busbw); no time is told if absent."""

    @property
    def num_ranks(self) -> int:
        """Processes of all machines."""
        return self.nodes * (self.gpus or self.num_processes)


@dataclass(frozen=True)
class HeldoutFields(DataFields, SamplingFields, ModelFields):
    """Fields of the commands that measure on held-out items."""

    num_prompts: int | None = None
    """Items to measure: those that a run on the same data with the same seed holds out."""


@dataclass(frozen=True)
class ScoreConfig(HeldoutFields):
    """Every field of ``nrt-fast score``."""

    output_file: str = "scores.jsonl"
    """JSON lines, one for each item; the file must be new."""

    def check(self) -> None:
        """Refuse values out of range and fields that could have no effect; UserError names the field."""
        check_score(self)


@dataclass(frozen=True)
class EvalConfig(HeldoutFields):
    """Every field of ``nrt-fast eval``."""

    num_generations: int = 1
    metrics: list[str] | str = "exact,normalised"
    """When an answer is right: exact, normalised, math (comma-separated); the verdict tells the first."""
    output_dir: str | None = None
    """Folder for results.json and the samples, new or empty; nothing is written if absent."""

    def check(self) -> None:
        """Refuse values out of range and fields that could have no effect; UserError names the field."""
        check_eval(self)

    @property
    def metric_names(self) -> list[str]:
        """The names in metrics."""
        return split_names(self.metrics)


@dataclass(frozen=True)
class GenerateConfig(SamplingFields, ModelFields):
    """Every field of ``nrt-fast generate``."""

    num_generations: int = 1
    question: str | None = None
    """The question; on the command line without --question."""
    input_file: str | None = None
    """Questions: one a line (.txt), or rows (.jsonl .json .csv .parquet, also .gz)."""
    prompt_field: str | None = None
    """Field that holds the question in rows; detected if absent."""
    output_file: str | None = None
    """JSON lines, one for each question; the file must be new. Standard output if absent."""

    def check(self) -> None:
        """Refuse values out of range and fields that could have no effect; UserError names the field."""
        check_generate(self)


@dataclass(frozen=True)
class ExportConfig(HubFields):
    """Every field of ``nrt-fast export``."""

    model_name_or_path: str | None = None
    """Folder or hub id of a model or of a PEFT adapter, such as a run's final or one of its checkpoints."""
    output_dir: str | None = None
    """Folder to write; new or empty."""
    merge_lora: bool = False
    """Write the adapter's model with the adapter in its weights, instead of the adapter alone."""

    def check(self) -> None:
        """Refuse a field that is missing; UserError names it."""
        check_export(self)


@dataclass(frozen=True)
class ReportConfig:
    """Every field of ``nrt-fast report``."""

    runs: list[str] | str | None = None
    """Folders of runs, finished or not; on the command line one after another, without --runs."""
    output_file: str | None = None
    """HTML file; report.html in the run's folder, of several runs in the current one. An earlier report is replaced."""

    def check(self) -> None:
        """Refuse a report of nothing, of too much, and a run named twice; UserError says so."""
        check_report(self)

    @property
    def folders(self) -> list[str]:
        """The names in runs."""
        return split_names(self.runs or [])
