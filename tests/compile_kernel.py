"""Compiles one Triton kernel for GPUs that need not be here, and prints what the compiler made of it as JSON.

    python tests/compile_kernel.py MODULE.KERNEL 80,90 '{"x_ptr": "*bf16", "V": "i32"}' '{"BLOCK_V": 4096}' NUM_WARPS

A process of its own: the interpreter that the other tests use replaces the compiler for good.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


def compile_kernel(path: str, sm: int, signature: dict[str, str], constants: dict[str, int], num_warps: int) -> dict:
    """Shared memory, spilled bytes and registers of ``nrt_fast.triton_kernels.<path>`` on compute capability ``sm``."""
    module, _, name = path.rpartition(".")
    kernel = getattr(import_module(f"nrt_fast.triton_kernels.{module}"), name)
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": num_warps})
    report = assemble(compiled.asm["ptx"], get_ptxas(sm).path)
    return {
        "sm": sm,
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
    }


def assemble(ptx: str, ptxas: str) -> str:
    """What the assembler says about the code."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch={target}", source, "-o", Path(folder, "kernel.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


if __name__ == "__main__":
    path, sms, signature, constants, num_warps = sys.argv[1:]
    kernel = (json.loads(signature), json.loads(constants), int(num_warps))
    print(json.dumps([compile_kernel(path, int(sm), *kernel) for sm in sms.split(",")]))
