"""nrt-fast: Native Reasoning Training, with the answer scored on the KV cache the trace was sampled with.

``import nrt_fast`` is light: torch is imported when one of the names below is first used.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Engine": "nrt_fast.engine",
    "Model": "nrt_fast.model",
    "TrainConfig": "nrt_fast.config",
    "UserError": "nrt_fast.types",
    "train": "nrt_fast.loop",
    "ops": "nrt_fast.ops",
    "rewards": "nrt_fast.rewards",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'nrt_fast' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name].endswith(f".{name}") else getattr(module, name)


def __dir__():
    return __all__
