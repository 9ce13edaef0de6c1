"""``nrt-fast export``: a model, or an adapter, alone in a folder of its own; with merge_lora an adapter as a model.

The folder's card goes along, and with push_to_hub all of it to the hub.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from nrt_fast.checkpoint import atomic_folder, new_folder, save_tokenizer
from nrt_fast.config import ExportConfig
from nrt_fast.data import has_tokenizer
from nrt_fast.hub import check_account, upload
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.folders import model_folder, read_config
from nrt_fast.model.lora import Adapter, Lora, a_name, b_name
from nrt_fast.model.model import save_tensors
from nrt_fast.model.peft_folder import CONFIG, TENSORS, base_folder, load_adapter, read_lora
from nrt_fast.model.weights import read_tensors
from nrt_fast.model_card import NAME
from nrt_fast.types import UserError

MODEL_FILES = ("config.json", "generation_config.json")


def export(config: ExportConfig) -> None:
    """Write the folder and say what it holds.

    Raises:
        UserError: bad input, or a folder that is not empty; nothing is written then.
    """
    config.check()
    check_account(config)
    name, output_dir = config.model_name_or_path, new_folder(config.output_dir)
    folder = model_folder(name)
    lora = read_lora(folder)
    base = folder if lora is None else base_folder(folder, lora)
    shape = ModelConfig.from_hf(read_config(base))
    if lora is None and config.merge_lora:
        raise UserError(f"merge_lora cannot take effect: {name} has no {CONFIG}, it is a whole model already")
    with atomic_folder(output_dir) as new:
        if lora is None or not config.merge_lora:
            told = "a model" if lora is None else f"an adapter of {lora.base_name}; --merge_lora true makes it a model"
            files = [CONFIG, TENSORS] if lora is not None else _model_files(folder)
            _copy(folder, [*files, NAME], new)
        else:
            told = f"a model: {lora.base_name} with the adapter merged into its weights"
            _copy(base, MODEL_FILES, new)
            save_tensors(dict(merged(base, folder, lora, shape)), new)
            _save_card(folder, new)
        save_tokenizer(None, folder if has_tokenizer(folder) else base, False, new)
    print(f"{output_dir} holds {told}")
    if config.push_to_hub:
        print(f"uploaded to {upload(output_dir, config)}")


@torch.no_grad()
def merged(base: Path, folder: Path, lora: Lora, shape: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model's weights with an adapter in them: summed in fp32, rounded once to their dtype."""
    adapter = Adapter(lora, shape, torch.float32, torch.device("cpu"))
    load_adapter(adapter, folder)
    missing = {name.partition(".lora_")[0] + ".weight" for name in adapter.tensors}
    for name, tensor in read_tensors(base):
        if name in missing:
            missing.discard(name)
            down, up = (adapter.tensors[matrix(name.removesuffix(".weight"))] for matrix in (a_name, b_name))
            if tensor.shape != (len(up), down.shape[1]):
                raise UserError(f"{base}: {name} has shape {list(tensor.shape)}, the config says otherwise")
            tensor = (tensor.float() + lora.scale * (up @ down)).to(tensor.dtype)
            if not torch.isfinite(tensor).all():
                raise UserError(f"{base}: {name} with the adapter in it holds NaN or Inf")
        yield name, tensor
    if missing:
        raise UserError(f"{base}: tensor {min(missing)} is missing")


def _save_card(folder: Path, new: Path) -> None:
    """The adapter's card, as that of a whole model."""
    if (folder / NAME).is_file():
        card = ModelCard.load(folder / NAME)
        card.data.library_name = "transformers"
        card.save(new / NAME)


def _model_files(folder: Path) -> list[str]:
    weights = sorted(path.name for path in folder.glob("model*.safetensors*"))
    if not weights:
        raise UserError(f"{folder} has no model.safetensors")
    return [*MODEL_FILES, *weights]


def _copy(source: Path, names: list[str] | tuple[str, ...], folder: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
