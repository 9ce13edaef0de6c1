"""Where the parameters live: one flat storage for weights we own, the module's own tensors for a live model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nrt_fast.model.config import ModelConfig
from nrt_fast.types import UserError

EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes in storage order: matrices, which decay, before vectors, which do not.

    q, k, v and gate, up are neighbours, so that each pair or triple is also one fused tensor.
    """
    shapes = {EMBED: (config.vocab_size, config.hidden_size)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        shapes |= _layer_shapes(config, f"model.layers.{layer}.")
    shapes[FINAL_NORM] = (config.hidden_size,)
    return dict(sorted(shapes.items(), key=lambda item: -len(item[1])))


def _layer_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (heads, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_heads, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_heads, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, heads, config.out_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes = {f"{prefix}{name}.weight": (out, inp) for name, (out, inp, _) in linears.items()}
    shapes |= {f"{prefix}{name}.bias": (out,) for name, (out, _, bias) in linears.items() if bias}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    return shapes | {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}


class OwnedWeights:
    """All parameters as views of one flat tensor that never moves.

    Attributes:
        flat: [num_parameters] in the model's dtype, matrices first.
        num_matrix_elements: where the vectors start.
        tensors: Hugging Face name → view.
        leaves: name → autograd leaf, neighbours fused; the leaf's name is that of its first part.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        shapes = parameter_shapes(config)
        self.num_matrix_elements = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
        self.flat = torch.zeros(sum(map(prod, shapes.values())), dtype=dtype, device=device)
        self.tensors: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        offset = 0
        for name, shape in shapes.items():
            self.tensors[name] = self.flat[offset : offset + prod(shape)].view(shape)
            offset += prod(shape)

    def group(self, *names: str) -> tuple[Tensor, ...]:
        """One leaf over the named neighbours, or nothing where the model has no such parameter."""
        fused = _fused(self.flat, self.tensors, names)
        for tensor in fused:
            self.leaves[names[0]] = tensor.requires_grad_()
        return fused


class FrozenWeights:
    """The same storage as constants, without autograd leaves: what an adapter stands on."""

    def __init__(self, weights: OwnedWeights | FrozenWeights):
        self.flat, self.tensors = weights.flat, weights.tensors

    def group(self, *names: str) -> tuple[Tensor, ...]:
        """One tensor over the named neighbours, or nothing where the model has no such parameter."""
        return _fused(self.flat, self.tensors, names)


def _fused(flat: Tensor, tensors: dict[str, Tensor], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    if names[0] not in tensors:
        return ()
    first = tensors[names[0]]
    start, rows = first.storage_offset(), sum(tensors[name].shape[0] for name in names)
    shape = (rows, *first.shape[1:])
    return (flat[start : start + prod(shape)].view(shape),)


class SharedWeights:
    """The parameters of a live ``transformers`` module, without a copy; under a PEFT adapter those of the base."""

    def __init__(self, module: torch.nn.Module):
        tensors = module.state_dict(keep_vars=True)
        self.tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}

    def group(self, *names: str) -> tuple[Tensor, ...]:
        """The named parameters one by one, or nothing where the model has none."""
        return tuple(self.tensors[name] for name in names) if names[0] in self.tensors else ()


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of every tensor of a folder's safetensors file or shards; UserError names what is broken."""
    for path in _weight_files(folder):
        yield from read_file(path)


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of every tensor of a safetensors file; UserError where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not a shard index: {error!r}") from None
    return [folder / shard for shard in shards]


def load_tensors(weights: OwnedWeights, folder: Path) -> None:
    """Copy a folder's tensors into place; UserError for a missing, misshapen or non-finite one."""
    missing = set(weights.tensors)
    for name, tensor in read_tensors(folder):
        if name not in weights.tensors:
            # A tied head may be stored as well; buffers of old checkpoints are recomputed.
            if name == HEAD or name.endswith(("rotary_emb.inv_freq", "masked_bias", "attn.bias")):
                continue
            raise UserError(f"{folder}: unexpected tensor {name}; the config describes no such parameter")
        target = weights.tensors[name]
        if tensor.shape != target.shape:
            raise UserError(f"{folder}: {name} has shape {list(tensor.shape)}, the config says {list(target.shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: {name} holds NaN or Inf")
        target.copy_(tensor)
        missing.discard(name)
    if missing:
        raise UserError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all)")
