"""The adapter of a live PEFT model: its matrices where peft has them, read as they are at every pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nrt_fast.model.config import ModelConfig
from nrt_fast.model.linear import Linear, LoraLinear, MadeLinear
from nrt_fast.model.lora import Lora, a_name, b_name
from nrt_fast.model.peft_folder import ALL_LINEAR, check_lora
from nrt_fast.model.weights import parameter_shapes
from nrt_fast.types import UserError


class LiveAdapter:
    """What an adapter adds to a live model, made of peft's own tensors; peft may keep them in another dtype.

    Attributes:
        lora: its shape.
        tensors: name → peft's parameter.
    """

    def __init__(self, lora: Lora, config: ModelConfig, dtype: torch.dtype, tensors: dict[str, Tensor]):
        self.lora, self.tensors, self._config, self._dtype = lora, tensors, config, dtype
        self._num_outputs = {name: shape[0] for name, shape in parameter_shapes(config).items()}

    @property
    def changes(self) -> bool:
        """Whether it adds anything; with every B still 0 it does not."""
        return any(bool(tensor.any()) for name, tensor in self.tensors.items() if ".lora_B." in name)

    def clone(self) -> LiveAdapter:
        """The same adapter on a copy of its numbers."""
        copies = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return LiveAdapter(self.lora, self._config, self._dtype, copies)

    def adapted(self, base: Linear, projections: list[str]) -> Linear | LoraLinear:
        """A projection, of fused neighbours perhaps, with the change of those that have one."""
        targets = [name for name in projections if a_name(name) in self.tensors]
        if not targets:
            return base
        return LoraLinear(base, MadeLinear(partial(self._down, targets)), MadeLinear(partial(self._up, projections)))

    def _down(self, targets: list[str]) -> Tensor:
        return torch.cat([self.tensors[a_name(name)] for name in targets]).to(self._dtype)

    def _up(self, projections: list[str]) -> Tensor:
        like = next(iter(self.tensors.values()))
        blocks = [
            self.tensors.get(b_name(name), like.new_empty(self._num_outputs[f"{name}.weight"], 0))
            for name in projections
        ]
        return (self.lora.scale * torch.block_diag(*blocks)).to(self._dtype)


def live_adapter(module: torch.nn.Module) -> LiveAdapter:
    """The active adapter of a PEFT model.

    Raises:
        UserError: it changes the model in a way that is not done here.
    """
    if len(module.active_adapters) != 1:
        raise UserError(f"the PEFT model has {len(module.active_adapters)} active adapters; one is needed")
    (active,) = module.active_adapters
    base = module.get_base_model()
    config, name = ModelConfig.from_hf(base.config), base.config.name_or_path or "a model in memory"
    given = module.peft_config[active].to_dict() | {"base_model_name_or_path": name}
    check_lora(given, f"the PEFT adapter {active!r}")
    matrix = f".{active}.weight"
    tensors = {
        name.replace(matrix, ".weight"): tensor
        for name, tensor in base.state_dict(keep_vars=True).items() if ".lora_" in name and name.endswith(matrix)
    }  # fmt: skip
    targets = tuple(target for target in ALL_LINEAR if any(f".{target}.lora_" in name for name in tensors))
    lora = Lora(given["r"], given["lora_alpha"], targets, bool(given.get("use_rslora")), name)
    expected = lora.shapes(config)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        strange = min(set(tensors) ^ set(expected), default="a matrix of another shape")
        raise UserError(f"the PEFT adapter {active!r}: {strange}; valid: the same of {', '.join(ALL_LINEAR)} in every "
                        "layer, whole on each device")  # fmt: skip
    return LiveAdapter(lora, config, base.get_input_embeddings().weight.dtype, tensors)
