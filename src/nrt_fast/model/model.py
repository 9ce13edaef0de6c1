"""The model users hold: loading, saving, growing, and its forward passes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from nrt_fast.kv_cache import NO_PREFIX, Sequence
from nrt_fast.model.config import ARCHITECTURES, ModelConfig, check_model_type
from nrt_fast.model.decoder import Decoder
from nrt_fast.model.inference import Inference
from nrt_fast.model.weights import EMBED, HEAD, OwnedWeights, SharedWeights, load_tensors
from nrt_fast.types import UserError

MAX_SHARD_SIZE = "5GB"


class Model(Decoder):
    """A decoder with its Hugging Face identity.

    Attributes:
        hf_config: the ``transformers`` config, saved again with the weights.
        eos_ids: ids that end a text, from the config and the generation config.
    """

    def __init__(self, hf_config, weights: OwnedWeights | SharedWeights, source: Path | None = None):
        super().__init__(ModelConfig.from_hf(hf_config), weights)
        self.hf_config = hf_config
        self.source = source
        self.eos_ids = _eos_ids(hf_config, source)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str | torch.dtype = "float32", device: str = "cpu") -> Model:
        """Load a Hugging Face folder (safetensors, sharded or not) or hub id into storage of our own.

        Args:
            path: folder, or hub id, which is downloaded.
            dtype: float32 or bfloat16, by name or as a torch dtype.
            device: cpu, cuda or cuda:N.

        Raises:
            UserError: unknown model type, missing or misshapen tensor, NaN or Inf in the weights.
        """
        folder = model_folder(path)
        hf_config = read_config(folder)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = cls(hf_config, OwnedWeights(ModelConfig.from_hf(hf_config), dtype, torch.device(device)), folder)
        model.load(folder)
        return model

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copy the weights of a Hugging Face folder into place; see from_pretrained for what it raises."""
        load_tensors(self.weights, folder)

    @classmethod
    def from_hf(cls, module: torch.nn.Module) -> Model:
        """View a live ``transformers`` causal-LM module: same storage, no copy, updates show at once."""
        return cls(module.config, SharedWeights(module))

    def clone(self) -> Model:
        """The same model on a copy of the weights. Owned weights only."""
        weights = OwnedWeights(self.config, self.weights.flat.dtype, self.weights.flat.device)
        weights.flat.copy_(self.weights.flat)
        return Model(self.hf_config, weights, self.source)

    @torch.no_grad()
    def grown(self, num_tokens: int, copy_of: int) -> Model:
        """A model with more vocabulary rows, each a copy of row ``copy_of`` in the embedding and in the head."""
        hf_config = copy.deepcopy(self.hf_config)
        hf_config.vocab_size += num_tokens
        weights = OwnedWeights(self.config.grown(num_tokens), self.weights.flat.dtype, self.weights.flat.device)
        for name, old in self.weights.tensors.items():
            new = weights.tensors[name]
            new[: old.shape[0]] = old
            if name in (EMBED, HEAD):
                new[old.shape[0] :] = old[copy_of]
        return Model(hf_config, weights, self.source)

    @torch.no_grad()
    def logits(self, token_ids: list[int] | Tensor) -> Tensor:
        """fp32 logits [T, V] of one sequence of T ids, for inspection."""
        ids, passes, sequence = torch.as_tensor(token_ids).tolist(), Inference(self), Sequence()
        passes.refresh()
        cache = passes.new_cache(1, page_size=len(ids))  # one page, whatever it takes
        cache.reserve(sequence, len(ids))
        return passes.logits(passes.extend(cache, [(NO_PREFIX, [sequence])], [ids]))

    def save_pretrained(self, path: str | Path) -> None:
        """Write config, generation config and safetensors (sharded over 5 GB) that transformers loads."""
        from huggingface_hub import save_torch_state_dict

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if self.source is not None and self.source != folder:
            _copy_generation_config(self.source, folder)
        self.hf_config.architectures = [ARCHITECTURES[self.config.model_type]]
        self.hf_config.dtype = self.embed.dtype  # transformers loads in the dtype that is written here
        self.hf_config.save_pretrained(folder)
        # Views of one flat storage look like aliases of each other to the writer; copies do not.
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.weights.tensors.items()}
        if self.config.tie_word_embeddings:
            tensors.pop(HEAD, None)
        save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})


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
    """The folder's ``transformers`` config; UserError where there is none or its model type is not ours."""
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; a Hugging Face model folder is needed") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    check_model_type(model_type, f"{path}: ")
    return AutoConfig.from_pretrained(folder)


def _eos_ids(hf_config, source: Path | None) -> tuple[int, ...]:
    ids = [hf_config.eos_token_id]
    if source is not None and (source / "generation_config.json").is_file():
        ids.append(json.loads((source / "generation_config.json").read_text()).get("eos_token_id"))
    flat = [i for entry in ids for i in (entry if isinstance(entry, list) else [entry]) if i is not None]
    return tuple(dict.fromkeys(flat))


def _copy_generation_config(source: Path, folder: Path) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
