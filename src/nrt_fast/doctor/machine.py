"""What a run stands on: the machine, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from nrt_fast import __version__
from nrt_fast.plan import GIB
from nrt_fast.source import device_memory

MISSING = "is not installed"
EXTRAS = ("gpu", "peft", "trackers", "math", "eval")  # those that users ask for


def machine_lines() -> Iterator[str]:
    """The processor and every GPU, or why there is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"machine: {platform.platform()}"
    memory = device_memory(torch.device("cpu")) / GIB
    yield f"CPU: {_cpu_name()}, {cores} cores, {memory:.1f} GiB; threads of torch: {torch.get_num_threads()}"
    if not torch.cuda.is_available():
        why = "torch sees none" if torch.version.cuda else "this torch was built without CUDA"
        yield f"GPU: {why}; Triton kernels run on CUDA devices alone"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / GIB
        yield f"GPU {index}: {found.name}, sm_{found.major}{found.minor}, {memory:.1f} GiB, CUDA {torch.version.cuda}"


def version_lines() -> Iterator[str]:
    """nrt-fast with what it requires, and each extra with what installs it where something is missing."""
    by_extra: dict[str | None, list[str]] = {}
    for requirement in metadata.requires("nrt-fast"):
        name, extra = re.match(r"([\w.-]+).*?(?:extra == [\"'](\w+)[\"'])?$", requirement).groups()
        by_extra.setdefault(extra, []).append(_version(name))
    yield f"nrt-fast {__version__}, Python {platform.python_version()}, {', '.join(by_extra[None])}"
    for extra in EXTRAS:
        told, quoted = ", ".join(by_extra[extra]), f"'nrt-fast[{extra}]'"
        yield f"extra {extra}: {told}{f'; pip install {quoted}' if MISSING in told else ''}"


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} {MISSING}"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
