"""What a user installs: the wheel's contents, each build option, and the state of the installed package."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import nrt_fast
from nrt_fast import ops

ROOT = Path(__file__).parent.parent
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]
SOURCES = [*FILES, "csrc", "src", "triton_kernels", "tests", "examples"]


def copy_sources(folder):
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder)
    return folder


def build(folder, kind, **environment):
    """Run the build backend's hook for a "wheel" or an "sdist" on a copy of the sources, as pip would."""
    sources = copy_sources(folder)
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=sources, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def wheel_files(folder):
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


def files_of(pattern):
    """Files of the repository, by their paths in it."""
    return {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}


PACKAGE = files_of("src/nrt_fast/**/*.py") | files_of("src/nrt_fast/starter/model/*")
KERNELS = files_of("triton_kernels/*.py")


def test_version_is_stated_once():
    assert metadata.version("nrt-fast") == nrt_fast.__version__


def test_the_wheel_holds_every_module_and_the_starter(tmp_path):
    result = build(tmp_path, "wheel", NRT_FAST_EXT="none")
    assert result.returncode == 0, result.stderr
    name, files = wheel_files(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    expected = {path.removeprefix("src/") for path in PACKAGE} | {f"nrt_fast/{path}" for path in KERNELS}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert files == expected | {f"nrt_fast-{nrt_fast.__version__}.dist-info/{path}" for path in about}


def test_the_sdist_holds_what_a_wheel_is_built_from(tmp_path):
    result = build(tmp_path, "sdist", NRT_FAST_EXT="none")
    assert result.returncode == 0, result.stderr
    name = f"nrt_fast-{nrt_fast.__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        files = {member.name.removeprefix(f"{name}/") for member in archive.getmembers() if member.isfile()}
    expected = PACKAGE | KERNELS | files_of("csrc/*") | {*FILES, "PKG-INFO", "setup.cfg"}
    assert {file for file in files if "egg-info" not in file} == expected


def test_without_a_compiler_the_wheel_is_built_and_works(tmp_path):
    result = build(tmp_path, "wheel", CC="/bin/false", CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert 'building extension "nrt_fast._C" failed' in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    code = (
        "import sys, torch, nrt_fast\n"
        "from nrt_fast import ops\n"
        "assert sys.argv[1] in nrt_fast.__file__, nrt_fast.__file__\n"
        "print(ops.backend()['pack_bins/cpu'], ops.pack_bins(torch.tensor([4, 7]), 10).tolist())"
    )
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    result = subprocess.run(
        [sys.executable, "-c", code, str(installed)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "reference [1, 0]", result.stderr


def test_an_extension_that_was_asked_for_must_build(tmp_path):
    result = build(tmp_path, "wheel", NRT_FAST_EXT="cpu", CC="/bin/false", CXX="/bin/false")
    assert result.returncode != 0


def test_an_unknown_build_option_is_named(tmp_path):
    result = build(tmp_path, "wheel", NRT_FAST_EXT="gpu")
    assert result.returncode != 0
    assert "NRT_FAST_EXT=gpu: expected auto, cpu, cuda or none" in result.stderr


def test_cuda_that_was_asked_for_must_be_here(tmp_path):
    """Without nvcc on the PATH; with it, a torch without CUDA is named in the same way."""
    result = build(tmp_path, "wheel", NRT_FAST_EXT="cuda", PATH=str(tmp_path))
    assert result.returncode != 0
    assert "NRT_FAST_EXT=cuda: nvcc is not on the PATH" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*.cu")), ids=lambda path: path.name)
def test_cuda_sources_compile_for_hopper(source, tmp_path):
    setup = runpy.run_path(str(ROOT / "setup.py"))
    output = tmp_path / "object.o"
    setup["compile_cuda"](str(source), str(output), setup["installed_torch"](), targets=(90,))
    assert output.stat().st_size > 0


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_extension_is_built_where_a_compiler_is():
    assert ops.missing("native") is None
    assert ops.backend()["pack_bins/cpu"] == "native"


def test_requirements_leave_torch_out_of_the_build():
    requirements = metadata.requires("nrt-fast")
    assert any(requirement.startswith("torch>=") for requirement in requirements)
    assert 'requires = ["setuptools>=77"]' in (ROOT / "pyproject.toml").read_text()
