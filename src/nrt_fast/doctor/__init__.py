"""``nrt-fast doctor``: machine and versions, what runs each op and why nothing faster does, and whether it is exact."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from nrt_fast import ops, packed_attention
from nrt_fast.doctor.machine import machine_lines, version_lines
from nrt_fast.doctor.self_test import Finding, examine_attention, examine_ops
from nrt_fast.source import choose_device, choose_dtype
from nrt_fast.tool_config import DoctorConfig

LABELS = {"native": "C++", "cuda": "CUDA C++", "triton": "Triton", "reference": "PyTorch", "plain": "PyTorch"}


def examine(config: DoctorConfig) -> bool:
    """Print everything; returns whether every op is exact.

    Raises:
        UserError: there is no such device.
    """
    console, device = Console(highlight=False), choose_device(config.device)
    dtype = choose_dtype("auto", device)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    for line in (*machine_lines(), *version_lines()):
        say(line)
    chosen, reasons = what_runs(device.type, dtype)
    attention = examine_attention(chosen["packed_attention"], device, dtype)
    findings = examine_ops(str(device)) | {"packed_attention": attention}
    say(f"\nops on {device}, {str(dtype).removeprefix('torch.')}:")
    for reason in sorted({reason for why in reasons.values() for reason in why.items()}):
        names = [op for op, why in sorted(reasons.items()) if reason in why.items()]
        say(f"without {LABELS.get(reason[0], reason[0])}, {reason[1]}: {', '.join(names)}")
    console.print(_table(chosen, findings))
    inexact = [op for op, finding in findings.items() if not finding.exact]
    for op in inexact:
        say(f"INEXACT: {op} is {findings[op].error:.2g} off; {findings[op].allowed:.2g} would be rounding")
    if not inexact:
        say(f"all {len(findings)} are exact: their error is at most twice that of the same computation in PyTorch")
    return not inexact


@torch.no_grad()  # Every form of an op may run without gradients.
def what_runs(device: str, dtype: torch.dtype) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """By op: what runs it on a kind of device, and why nothing faster does."""
    reasons: dict[str, dict[str, str]] = {**ops.obstacles(device)}
    chosen: dict[str, str] = {op: ops.backend()[f"{op}/{device}"] for op in reasons}
    chosen["packed_attention"] = packed_attention.backend(device, dtype)
    reasons["packed_attention"] = packed_attention.obstacles(device, dtype)
    return chosen, reasons


def _table(chosen: dict[str, str], findings: dict[str, Finding]) -> Table:
    table = Table(caption="exact, speed: beside plain PyTorch in one small training step, forward and backward")
    for heading in ("op", "runs as", "exact", "speed"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "speed" else "left")
    for op, backend in sorted(chosen.items()):
        label = LABELS.get(backend, backend)
        if op in findings:
            table.add_row(op, label, "yes" if findings[op].exact else "NO", f"{findings[op].speedup:.1f} x")
        elif label != "PyTorch":
            table.add_row(op, label, "not called", "")
    return table
