"""Hugging Face folders: where they are, and the configuration in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nrt_fast.model.config import ModelConfig, check_model_type
from nrt_fast.types import UserError


def model_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id downloaded (configuration, tokenizer and safetensors files only)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise UserError(f"model {path}: no such folder; valid: a Hugging Face folder or a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {path}: neither a folder here nor a hub id that can be reached ({reason})") from None


def read_config(folder: Path):
    """The folder's ``transformers`` config; UserError where there is none, or none of a model that is ours."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; a Hugging Face model folder is needed")
    check_model_type(read_json(path).get("model_type"), f"{path}: ")
    try:
        hf_config = AutoConfig.from_pretrained(folder)
        ModelConfig.from_hf(hf_config)
    except UserError:
        raise
    except Exception as error:  # transformers' checks raise whatever they meet
        raise UserError(f"{path} describes no model: {error.__cause__ or error!r}") from error
    return hf_config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; UserError where it is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object")
    return values


def write_config(hf_config, folder: Path) -> None:
    """Write config.json, with the rotary embeddings under the names of transformers 4 as well.

    transformers 5 writes ``rope_parameters`` alone. An older reader knows no such name and would silently compute with
    its defaults.
    """
    hf_config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if rope := values.get("rope_parameters"):
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
