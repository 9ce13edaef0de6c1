"""Builds the C++ ops against the torch that is already installed; everything else is in pyproject.toml.

NRT_FAST_EXT chooses: ``auto`` (the default) tries and installs without them if that fails, ``cpu`` insists on them,
``cuda`` insists on them and on csrc/*.cu, which needs nvcc and a torch with CUDA, ``none`` builds nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MIN_TORCH = (2, 11)
MACROS = [("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000ULL".format(*MIN_TORCH))]
CUDA_TARGETS = (80, 90, 100)


def installed_torch() -> Path | None:
    """Folder of the target environment's torch; pip's build isolation hides it from sys.path, not from purelib."""
    places = [Path(sysconfig.get_path("purelib")), *map(Path, sys.path)]
    return next((place / "torch" for place in places if (place / "torch/version.py").is_file()), None)


def torch_version(torch: Path) -> tuple[int, int]:
    """(major, minor) as torch/version.py states it; importing torch would take seconds."""
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def compile_cuda(source: str, output: str, torch: Path, targets: tuple[int, ...] = CUDA_TARGETS) -> None:
    """Compile a .cu file to an object for these compute capabilities and, as PTX, for later ones."""
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    macros = ["-DUSE_CUDA", *(f"-D{name}={value}" for name, value in MACROS)]  # USE_CUDA: torch's header has streams
    command = ["nvcc", "-c", "-std=c++17", "-O3", *codes, *macros, f"-I{torch / 'include'}"]
    subprocess.run([*command, "-Xcompiler=-fPIC,-fvisibility=hidden", source, "-o", output], check=True)


def cuda_library_folders() -> list[str]:
    """Where nvcc links from; it may be a wrapper that lies far from its toolkit."""
    plan = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], check=True, capture_output=True, text=True)
    return re.findall(r'"-L([^"]+)"', plan.stderr)


class BuildExtension(build_ext):
    """Compiles the .cu files among the sources before the rest."""

    def build_extension(self, extension: Extension) -> None:
        cuda_sources = [source for source in extension.sources if source.endswith(".cu")]
        extension.sources = [source for source in extension.sources if source not in cuda_sources]
        for source in cuda_sources:
            output = Path(self.build_temp, source).with_suffix(".o")
            output.parent.mkdir(parents=True, exist_ok=True)
            compile_cuda(source, str(output), Path(extension.include_dirs[0]).parent)
            extension.extra_objects.append(str(output))
        super().build_extension(extension)


def extension(torch: Path, wanted: str) -> Extension:
    """The ops of csrc/ on torch's stable ABI: one binary serves every torch from MIN_TORCH on, and every Python."""
    cuda = wanted == "cuda"
    return Extension(
        "nrt_fast._C",
        sources=sorted(map(str, [*Path("csrc").glob("*.cpp"), *(Path("csrc").glob("*.cu") if cuda else [])])),
        depends=sorted(map(str, Path("csrc").glob("*.h"))),
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib"), *(cuda_library_folders() if cuda else [])],
        libraries=["c10", "torch_cpu", "torch", *(["torch_cuda", "cudart_static", "rt", "dl"] if cuda else [])],
        define_macros=MACROS,
        extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-g0", "-fvisibility=hidden"],
        language="c++",
        py_limited_api=True,
        optional=wanted == "auto",
    )


def build_problem(torch: Path | None, wanted: str) -> str | None:
    """Why the extension cannot be built here, or None."""
    if torch is None or torch_version(torch) < MIN_TORCH:
        return f"torch {'.'.join(map(str, MIN_TORCH))} or later is not installed here, so the C++ ops cannot be built"
    if wanted == "cuda" and shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    if wanted == "cuda" and not (torch / "lib/libtorch_cuda.so").exists():
        return "the installed torch was built without CUDA"
    return None


def extensions() -> list[Extension]:
    """What NRT_FAST_EXT asks for, as far as this machine can build it."""
    wanted = os.environ.get("NRT_FAST_EXT", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"NRT_FAST_EXT={wanted}: expected auto, cpu, cuda or none")
    if wanted == "none":
        return []
    problem = build_problem(torch := installed_torch(), wanted)
    if problem is None:
        return [extension(torch, wanted)]
    if wanted != "auto":
        raise SystemExit(f"NRT_FAST_EXT={wanted}: {problem}")
    print(f"warning: {problem}; the PyTorch reference replaces them", file=sys.stderr)
    return []


if __name__ == "__main__":
    setup(
        packages=[*find_packages("src"), "nrt_fast.triton_kernels"],
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
