"""Adapters in peft's files: adapter_config.json and adapter_model.safetensors, read without peft, written with it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nrt_fast.model.folders import model_folder
from nrt_fast.model.lora import NEIGHBOURS, Adapter, Lora
from nrt_fast.model.weights import read_file
from nrt_fast.types import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ALL_LINEAR = tuple(name for neighbours in NEIGHBOURS for name in neighbours)
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "base_model_name_or_path", "task_type"}
HARMLESS = {  # they say how an adapter was trained or where it came from, not what it computes
    "auto_mapping", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # of A and B; others change the model's weights too
NAME = re.compile(
    re.escape(PREFIX) + rf"(model\.layers\.\d+\.\w+\.({'|'.join(ALL_LINEAR)}))\.lora_[AB]\.weight"
)  # fmt: skip


def check_peft() -> None:
    """UserError with the command that installs peft, where it is not."""
    if find_spec("peft") is None:
        raise UserError("use_peft writes adapters with peft, which is not installed: pip install 'nrt-fast[peft]'")


def read_lora(folder: Path) -> Lora | None:
    """What adapter a folder holds, or None where it holds none.

    Raises:
        UserError: it changes a model in a way that is not done here.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        rank, alpha = int(config["r"]), config["lora_alpha"] + 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of a LoRA adapter: {error!r}") from None
    check_lora(config, str(path))
    use_rslora = bool(config.get("use_rslora"))
    return Lora(rank, alpha, _targets(folder), use_rslora, config["base_model_name_or_path"])


def check_lora(config: dict[str, Any], where: str) -> None:
    """UserError, led by ``where``, unless peft's configuration is one of plain LoRA."""
    for problem in _problems(config):
        raise UserError(f"{where}: {problem}; valid: plain LoRA (rank, alpha, rslora) of the projections of all layers")


def _problems(config: dict[str, Any]):
    if config.get("peft_type") != "LORA":
        yield f"peft_type {config.get('peft_type')!r} is not supported"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type {config['task_type']!r} is not supported"
    if config["r"] < 1:
        yield f"r is {config['r']}"
    for name, value in config.items():
        if name not in READ | HARMLESS and value not in (None, False, "none", [], {}):
            yield f"{name} {value!r} is not supported"
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        yield f"init_lora_weights {start!r}, which changes the model's own weights, is not supported"
    if not config.get("base_model_name_or_path"):
        yield "base_model_name_or_path, the model it belongs to, is not there"


def _targets(folder: Path) -> tuple[str, ...]:
    """The adapted projections as the tensors' names tell: target_modules may also be a pattern."""
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(f"{folder} has an {CONFIG} but no {TENSORS}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(f"{path}: {name} is no LoRA matrix of a layer's projection ({', '.join(ALL_LINEAR)})")
    found = {NAME.fullmatch(name)[2] for name in names}
    if not found:
        raise UserError(f"{path} holds no tensor")
    return tuple(name for name in ALL_LINEAR if name in found)


def base_folder(folder: Path, lora: Lora) -> Path:
    """Folder of the model that an adapter belongs to; UserError where it cannot be had."""
    try:
        return model_folder(lora.base_name)
    except UserError as error:
        raise UserError(f"base_model_name_or_path of {folder / CONFIG}: {error}") from None


@torch.no_grad()
def load_adapter(adapter: Adapter, folder: Path) -> None:
    """Copy an adapter's tensors into place; UserError for a missing, misshapen or non-finite one."""
    path, missing = folder / TENSORS, set(adapter.tensors)
    for stored, tensor in read_file(path):
        name = stored.removeprefix(PREFIX)
        target: Tensor | None = adapter.tensors.get(name)
        if target is None:
            raise UserError(f"{path}: unexpected tensor {stored}; the model has no such projection")
        if tensor.shape != target.shape:
            raise UserError(f"{path}: {stored} has shape {list(tensor.shape)}, {list(target.shape)} is needed")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {stored} holds NaN or Inf")
        target.copy_(tensor)
        missing.discard(name)
    if missing:
        raise UserError(f"{path}: tensor {PREFIX}{min(missing)} is missing ({len(missing)} in all)")


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the two files; the numbers as they are computed with, bf16 or fp32."""
    check_peft()
    from peft import LoraConfig

    lora = adapter.lora
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM", base_model_name_or_path=lora.base_name, inference_mode=True,
    )  # fmt: skip
    config.target_modules = list(lora.targets)  # peft's own is a set, which would be written in any order
    config.save_pretrained(folder)
    # Views of one flat storage look like aliases of each other to the writer; copies do not.
    tensors = {f"{PREFIX}{name}": tensor.detach().to("cpu", copy=True) for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
