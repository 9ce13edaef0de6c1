"""The compile lane: what the compiler makes of every Triton kernel at real shapes, for GPUs that need not be here.

    python tests/compile_lane.py [OP ...]     compile these ops (all, if none is named) and print the result as JSON
    python tests/compile_lane.py --write      compile all, write bench/results/kernels.json and kernels.md

A process of its own: the interpreter that the other tests use replaces the compiler for good. The cases of
compile_cases.py call the ordinary launchers; Triton's own binder makes signature, constants and alignment of each
launch, and where it would compile and launch, the launch is recorded instead. Each distinct specialisation is compiled
once for each of its model's targets, in as many processes as there are cores.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import triton
from compile_cases import CASES, FP64_KERNELS, MODELS, NO_WGMMA_KERNELS, TARGETS
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nrt_fast import triton_kernels

RESULTS = Path(__file__).parents[1] / "bench/results"
MATRIX_UNITS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


@dataclass
class Launch:
    """One specialisation of a kernel for one target, and the models whose shapes lead to it."""

    op: str
    kernel: JITFunction
    sm: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]
    models: list[str] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, str, int, int]:
        """Equal for equal specialisations, whatever the target."""
        return self.kernel.__name__, self._specialisation(), self.options["num_warps"], self.options["num_stages"]

    def _specialisation(self) -> str:
        """Arguments with their types (/16: divisible by 16), then constants."""
        names = list(self.signature)
        divisible = {path[0] for path, attributes in self.attributes.items() if attributes}
        typed = [
            f"{name}: {type_}{'/16' if index in divisible else ''}"
            for index, (name, type_) in enumerate(self.signature.items())
            if type_ != "constexpr"
        ]
        return ", ".join(typed + [f"{names[path[0]]}={value}" for path, value in self.constants.items()])


class Recorder:
    """Stands in for Triton's driver and compiler while the cases run; keeps every launch and makes none."""

    def __init__(self):
        self.launches: dict[tuple, Launch] = {}
        self.errors: dict[str, str] = {}
        self._op = self._model = ""

    def record(self, ops: list[str]) -> None:
        """Call these ops' cases on every model, for each of its targets."""
        recorder = self

        def do_compile(kernel, key, signature, sm, constants, options, attributes, warmup):
            launch = Launch(recorder._op, kernel, sm, signature, constants, attributes, options.__dict__)
            models = recorder.launches.setdefault((sm, *launch.row), launch).models
            if recorder._model not in models:
                models.append(recorder._model)

        JITFunction._do_compile = do_compile  # returns no kernel, so run() ends there
        for sm in TARGETS:
            driver.set_active(
                SimpleNamespace(
                    get_current_target=lambda sm=sm: GPUTarget("cuda", sm, 32),
                    get_current_device=lambda sm=sm: sm,
                    get_current_stream=lambda device: 0,
                )
            )
            for self._op in ops:
                for model in [model for model in MODELS if sm in model.targets]:
                    self._model = model.name
                    try:
                        CASES[self._op](model)
                    except Exception:
                        self.errors[f"{self._op}, {model.name}, sm_{sm}"] = traceback.format_exc(limit=-4)


def compile_launch(launch: Launch) -> dict[str, object]:
    """Registers, shared memory and spills as the assembler reports them, and which units the code uses."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", launch.sm, 32), options=launch.options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}\n{log.getvalue()[:2000]}"}
    ptx = compiled.asm["ptx"]
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log.getvalue()))),
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
        "matrix_unit": next((unit for unit, instruction in MATRIX_UNITS.items() if instruction in ptx), None),
        "fp64": ".f64" in ptx,
        "dot": "tt.dot" in compiled.asm["ttir"],
    }


_launches: list[Launch] = []  # reaches the worker processes by fork: kernels cannot be pickled


def compile_nth(index: int) -> dict[str, object]:
    return compile_launch(_launches[index])


def compile_all(launches: list[Launch]) -> list[dict[str, object]]:
    """What the compiler made of each launch, in order."""
    knobs.compilation.always_compile = True  # a cached kernel has no assembler log
    knobs.nvidia.dump_ptxas_log = True
    _launches[:] = launches
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=fork) as pool:
        return list(pool.map(compile_nth, range(len(launches))))


def all_kernels() -> set[str]:
    """Names of the kernels in ``nrt_fast.triton_kernels``; functions that kernels call do not end in _kernel."""
    names = [module.name for module in pkgutil.iter_modules(triton_kernels.__path__)]
    return {
        name
        for module in (import_module(f"{triton_kernels.__name__}.{name}") for name in names)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def measure(ops: list[str]) -> dict[str, object]:
    """The table's rows, cases that failed, kernels that no case launched, and the declared exceptions."""
    recorder = Recorder()
    recorder.record(ops)
    launches = list(recorder.launches.values())
    rows: dict[tuple, dict] = {}
    for launch, report in zip(launches, compile_all(launches), strict=True):
        kernel, specialisation, num_warps, num_stages = launch.row
        row = rows.setdefault(
            launch.row,
            {
                "op": launch.op, "kernel": kernel, "specialisation": specialisation, "num_warps": num_warps,
                "num_stages": num_stages, "models": launch.models,
            },
        )  # fmt: skip
        row[f"sm_{launch.sm}"] = report
    return {
        "triton": triton.__version__,
        "rows": [rows[key] for key in sorted(rows)],
        "case_errors": recorder.errors,
        "never_launched": sorted(all_kernels() - {launch.kernel.__name__ for launch in launches}),
        "fp64_kernels": FP64_KERNELS,
        "no_wgmma_kernels": NO_WGMMA_KERNELS,
    }


def write(result: dict[str, object]) -> None:
    """bench/results/kernels.json, one row a line, and the same for readers."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kernels.json").write_text(f'{{"triton": "{result["triton"]}", "rows": [\n{rows}\n]}}\n')
    (RESULTS / "kernels.md").write_text(as_markdown(result))


def as_markdown(result: dict[str, object]) -> str:
    lines = [
        "# What the compiler made of each kernel",
        "",
        f"Triton {result['triton']}; written by `make kernels`. For sm_80 / sm_90 / sm_100: registers a thread, KiB of",
        "shared memory, matrix unit; - where an op launches another kernel, or uses none; the starter's shapes are",
        "compiled for sm_90 alone. A test allows no spills.",
        "",
        "| kernel | constants | warps, stages | registers | shared | matrix unit |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        reports = [row.get(f"sm_{sm}", {}) for sm in TARGETS]
        constants = ", ".join(part for part in row["specialisation"].split(", ") if "=" in part)
        registers = " / ".join(str(report.get("registers", "-")) for report in reports)
        shared = " / ".join(f"{r['shared_bytes'] / 1024:.1f}" if "shared_bytes" in r else "-" for r in reports)
        units = " / ".join(report.get("matrix_unit") or "-" for report in reports)
        warps = f"{row['num_warps']}, {row['num_stages']}"
        lines.append(f"| {row['kernel']} | {constants} | {warps} | {registers} | {shared} | {units} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to compile; all, if none is named")
    parser.add_argument("--write", action="store_true", help="write the table to bench/results")
    arguments = parser.parse_args()
    result = measure(arguments.ops or list(CASES))
    write(result) if arguments.write else print(json.dumps(result, indent=1))
