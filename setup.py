"""Builds the C++ ops against the torch that is already installed; everything else is in pyproject.toml.

NRT_FAST_EXT chooses: ``auto`` (the default) tries and installs without them if that fails, ``cpu`` insists on them,
``none`` builds nothing. ``cuda`` is refused for as long as csrc/ has no CUDA source.
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup

MIN_TORCH = (2, 11)


def installed_torch() -> Path | None:
    """Folder of the target environment's torch; pip's build isolation hides it from sys.path, not from purelib."""
    places = [Path(sysconfig.get_path("purelib")), *map(Path, sys.path)]
    return next((place / "torch" for place in places if (place / "torch/version.py").is_file()), None)


def torch_version(torch: Path) -> tuple[int, int]:
    """(major, minor) as torch/version.py states it; importing torch would take seconds."""
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def cpp_ops(torch: Path, optional: bool) -> Extension:
    """The ops of csrc/ on torch's stable ABI: one binary serves every torch from MIN_TORCH on, and every Python."""
    major, minor = MIN_TORCH
    return Extension(
        "nrt_fast._C",
        sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
        depends=sorted(map(str, Path("csrc").glob("*.h"))),
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["c10", "torch_cpu", "torch"],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000ULL")],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
        language="c++",
        py_limited_api=True,
        optional=optional,
    )


def extensions() -> list[Extension]:
    """What NRT_FAST_EXT asks for, as far as this machine can build it."""
    wanted = os.environ.get("NRT_FAST_EXT", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"NRT_FAST_EXT={wanted}: expected auto, cpu, cuda or none")
    if wanted == "cuda":
        raise SystemExit("NRT_FAST_EXT=cuda: no op has a CUDA source; the GPU kernels are Triton's and need no build")
    if wanted == "none":
        return []
    torch = installed_torch()
    if torch and torch_version(torch) >= MIN_TORCH:
        return [cpp_ops(torch, optional=wanted == "auto")]
    problem = f"torch {'.'.join(map(str, MIN_TORCH))} or later is not installed here, so the C++ ops cannot be built"
    if wanted != "auto":
        raise SystemExit(f"NRT_FAST_EXT={wanted}: {problem}")
    print(f"warning: {problem}; the PyTorch reference replaces them", file=sys.stderr)
    return []


setup(
    packages=[*find_packages("src"), "nrt_fast.triton_kernels"],
    ext_modules=extensions(),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
