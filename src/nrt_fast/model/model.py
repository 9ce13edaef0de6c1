"""The model users hold: loading, saving, growing, and its forward passes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor

from nrt_fast.kv_cache import NO_PREFIX, Sequence
from nrt_fast.model.config import ARCHITECTURES, ModelConfig
from nrt_fast.model.decoder import Decoder
from nrt_fast.model.folders import model_folder, read_config, read_json, write_config
from nrt_fast.model.inference import Inference
from nrt_fast.model.lora import Adapter, Lora
from nrt_fast.model.peft_folder import base_folder, load_adapter, read_lora, save_adapter
from nrt_fast.model.peft_live import LiveAdapter, live_adapter
from nrt_fast.model.weights import EMBED, HEAD, FrozenWeights, OwnedWeights, SharedWeights, load_tensors

MAX_SHARD_SIZE = "5GB"


class Model(Decoder):
    """A decoder with its Hugging Face identity.

    Attributes:
        hf_config: the ``transformers`` config, saved again with the weights.
        source: folder of the weights, without the adapter.
        eos_ids: ids that end a text, from the config and the generation config.
    """

    def __init__(
        self, hf_config, weights: OwnedWeights | FrozenWeights | SharedWeights, source: Path | None = None,
        adapter: Adapter | LiveAdapter | None = None,
    ):  # fmt: skip
        super().__init__(ModelConfig.from_hf(hf_config), weights, adapter)
        self.hf_config = hf_config
        self.source = source
        self.eos_ids = _eos_ids(hf_config, source)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str | torch.dtype = "float32", device: str = "cpu") -> Model:
        """Load a Hugging Face folder (safetensors, sharded or not) or hub id into storage of our own.

        Args:
            path: folder, or hub id, which is downloaded; of a model, or of a PEFT adapter, whose model is loaded too.
            dtype: float32 or bfloat16, by name or as a torch dtype.
            device: cpu, cuda or cuda:N.

        Raises:
            UserError: unknown model type, missing or misshapen tensor, NaN or Inf in the weights.
        """
        given = model_folder(path)
        lora = read_lora(given)
        folder = given if lora is None else base_folder(given, lora)
        hf_config = read_config(folder)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = cls(hf_config, OwnedWeights(ModelConfig.from_hf(hf_config), dtype, torch.device(device)), folder)
        model.load(folder)
        if lora is not None:
            model = model.with_adapter(lora)
            model.load(given)
        return model

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copy what is trained from its folder into place; see from_pretrained for what it raises."""
        if self.adapter is None:
            load_tensors(self.weights, folder)
        else:
            load_adapter(self.adapter, folder)

    @property
    def trained(self) -> OwnedWeights | Adapter:
        """What an optimizer changes: all weights, or the adapter alone."""
        return self.weights if self.adapter is None else self.adapter

    def with_adapter(self, lora: Lora) -> Model:
        """The same weights as constants, under a new adapter of zeros. Owned weights only."""
        adapter = Adapter(lora, self.config, self.weights.flat.dtype, self.weights.flat.device)
        return Model(self.hf_config, FrozenWeights(self.weights), self.source, adapter)

    def without_adapter(self) -> Model:
        """The same weights without what the adapter adds."""
        return Model(self.hf_config, self.weights, self.source)

    @classmethod
    def from_hf(cls, module: torch.nn.Module) -> Model:
        """View a live ``transformers`` causal-LM module, or a PEFT LoRA model of one: same storage, no copy, updates
        show at once.

        Raises:
            UserError: unknown model type, or an adapter that is not plain LoRA.
        """
        if not hasattr(module, "get_base_model"):
            return cls(module.config, SharedWeights(module))
        base = module.get_base_model()
        return cls(base.config, SharedWeights(base), adapter=live_adapter(module))

    @torch.no_grad()
    def clone(self) -> Model:
        """The same model on a copy of what is trained."""
        if self.adapter is not None:
            return Model(self.hf_config, self.weights, self.source, self.adapter.clone())
        weights = OwnedWeights(self.config, self.embed.dtype, self.embed.device)
        for name, tensor in weights.tensors.items():
            tensor.copy_(self.weights.tensors[name])
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
        if self.adapter is not None:
            return Model(hf_config, FrozenWeights(weights), self.source, self.adapter)
        return Model(hf_config, weights, self.source)

    @torch.no_grad()
    def copy_row(self, source: int, target: int) -> None:
        """Make vocabulary row ``target`` a copy of row ``source`` in the embedding and in the head."""
        for name in {EMBED, HEAD} & self.weights.tensors.keys():
            self.weights.tensors[name][target] = self.weights.tensors[name][source]

    @torch.no_grad()
    def logits(self, token_ids: list[int] | Tensor) -> Tensor:
        """fp32 logits [T, V] of one sequence of T ids, for inspection."""
        ids, passes, sequence = torch.as_tensor(token_ids).tolist(), Inference(self), Sequence()
        passes.refresh()
        cache = passes.new_cache(1, page_size=len(ids))  # one page, whatever it takes
        cache.reserve(sequence, len(ids))
        return passes.logits(passes.extend(cache, [(NO_PREFIX, [sequence])], [ids]))

    def save_pretrained(self, path: str | Path) -> None:
        """Write config, generation config and safetensors (sharded over 5 GB) that transformers loads.

        With an adapter: its adapter_config.json and adapter_model.safetensors, which peft loads, and nothing else.
        """
        if self.adapter is not None:
            return save_adapter(self.adapter, Path(path))
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if self.source is not None and self.source != folder:
            _copy_generation_config(self.source, folder)
        self.hf_config.architectures = [ARCHITECTURES[self.config.model_type]]
        self.hf_config.dtype = self.embed.dtype  # transformers loads in the dtype that is written here
        write_config(self.hf_config, folder)
        # Views of one flat storage look like aliases of each other to the writer; copies do not.
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.weights.tensors.items()}
        if self.config.tie_word_embeddings:
            tensors.pop(HEAD, None)
        save_tensors(tensors, folder)


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write CPU tensors as safetensors, sharded over 5 GB."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})


def _eos_ids(hf_config, source: Path | None) -> tuple[int, ...]:
    ids = [hf_config.eos_token_id]
    if source is not None and (source / "generation_config.json").is_file():
        ids.append(read_json(source / "generation_config.json").get("eos_token_id"))
    flat = [i for entry in ids for i in (entry if isinstance(entry, list) else [entry]) if i is not None]
    return tuple(dict.fromkeys(flat))


def _copy_generation_config(source: Path, folder: Path) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
