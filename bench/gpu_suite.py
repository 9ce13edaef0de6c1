"""The GPU's turn: every op checked at real shapes, then timed beside its floor and its peers; one table, one JSON.

    python bench/gpu_suite.py --build --out results.json           on a GPU machine, from a source tree, not installed
    python bench/gpu_suite.py --device cpu --quick                 the same code at tiny shapes, to test it

Errors are measured against fp64 and may be twice those of PyTorch's expression in the same dtype, plus ATOL. What fails
a check is not timed. A section of gpu_sections.py, gpu_engine.py or gpu_train.py that raises or runs out of its time is
recorded and left; if its error took the CUDA context along, a fresh process goes on. All of it stays within nine
minutes, and the JSON is written after each section. Name sections to have them alone, such as engine_8b.
Peers (Liger, cut-cross-entropy, TRL, xformers) are timed where they can be imported: add a folder of unpacked wheels
with --peers. Exit code 1 if a check failed or a section raised.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from timing import WARMUP_ROUNDS, copy_bandwidth, interleaved
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ATOL = 1e-5
MAX_SECONDS = 520  # no section starts after that
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl", "xformers")


class SectionTimeoutError(BaseException):
    """Raised by the alarm in the middle of a section, past whatever takes an Exception for its own."""


class Suite:
    """What the sections use: sizes, checks, timings. Everything ends up in ``records``."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)
        self.records: list[dict] = []
        self.section = ""
        self.context_died = False
        self.bandwidth = copy_bandwidth(device, 2**22 if quick else 2**30)  # bytes read and written a second

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.quick else real

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, device=self.device)
        return x.mul_(scale).to(dtype or self.dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def check(self, name: str, ours: Tensor, exact: Tensor, plain: Tensor, bound: float | None = None) -> None:
        """Largest error of ours against at most twice that of plain, plus ATOL of the largest value, and ``bound``."""
        exact = exact.double()
        error, plain_error = (float((x.double() - exact).abs().max()) for x in (ours, plain))
        allowed = 2 * plain_error + ATOL * max(1.0, float(exact.abs().max()))
        allowed = allowed if bound is None else min(allowed, bound)
        self.record(kind="check", name=name, error=error, allowed=allowed, passed=error <= allowed)  # NaN: not passed

    def check_equal(self, name: str, ours: Tensor, expected: Tensor, share: float = 1.0) -> None:
        """At least this share of the elements is equal."""
        error = 1.0 - float((ours == expected).double().mean())
        self.record(kind="check", name=name, error=error, allowed=1.0 - share, passed=error <= 1.0 - share)

    def check_close(self, name: str, ours: Tensor, theirs: Tensor, allowed: float, mean: bool = False) -> None:
        """Largest difference, or the mean one, of two ways to compute the same numbers."""
        difference = (ours.double().cpu() - theirs.double().cpu()).abs()
        error = float(difference.mean() if mean else difference.max())
        self.record(kind="check", name=name, error=error, allowed=allowed, passed=error <= allowed)

    def compare(
        self, name: str, contenders: dict[str, Callable[[], object]], peers: dict[str, Callable] | None = None,
        floor_seconds: float | None = None, rounds: int = 15, warmup_rounds: int = WARMUP_ROUNDS,
        clock: Callable[[], float] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Median seconds, by turns; the first contender is ours. ``peers`` build their call, or raise and are noted.

        Nothing is timed, and nothing returned, if a check of it failed.
        """
        if failed := self.failed(name):
            self.record(kind="note", name=name, text=f"not timed: {', '.join(failed)} failed")
            return {}
        contenders = dict(contenders)
        for peer, build in (peers or {}).items():
            try:
                call = build()
                call()
                contenders[peer] = call
            except Exception as error:
                self.record(kind="note", name=f"{name}: {peer}", text=f"{type(error).__name__}: {error}"[:300])
        rounds, warmup_rounds = (1, 0) if self.quick else (rounds, warmup_rounds)
        seconds = interleaved(contenders, self.device, rounds, warmup_rounds, clock)
        ours = next(iter(seconds.values()))
        self.record(
            kind="time", name=name, us={who: round(1e6 * value, 2) for who, value in seconds.items()},
            of_floor=None if floor_seconds is None else round(floor_seconds / ours, 4),
            floor_us=None if floor_seconds is None else round(1e6 * floor_seconds, 2),
        )  # fmt: skip
        return seconds

    def failed(self, name: str) -> list[str]:
        """Checks of this section that failed and are called "name: ...", or are about nothing in particular."""
        failed = [r["name"] for r in self.records if r["section"] == self.section and r.get("passed") is False]
        return [check for check in failed if check.startswith(f"{name}: ") or ": " not in check]

    def record_speed(self, name: str, tokens_per_second: dict[str, float], roofline: float) -> None:
        """Decoded tokens a second; the first is ours, ``roofline`` what the device could decode."""
        ours = next(iter(tokens_per_second.values()))
        rounded = {who: round(value, 1) for who, value in tokens_per_second.items()}
        self.record(
            kind="speed", name=name, tokens_per_second=rounded, roofline=round(roofline, 1),
            of_roofline=round(ours / roofline, 4),
        )  # fmt: skip

    def bytes_floor(self, *tensors: Tensor, times: float = 1.0) -> float:
        """Seconds to move these tensors once, or ``times``."""
        return times * sum(x.numel() * x.element_size() for x in tensors) / self.bandwidth

    def record(self, **fields) -> None:
        self.records.append({"section": self.section, **fields})
        print(self.section, *(f"{name}={value}" for name, value in fields.items()), flush=True)

    def run(self, name: str, section: Callable[["Suite"], None], seconds: int) -> None:
        """One section within its time; whatever it raises is recorded."""
        self.section, start = name, time.monotonic()
        try:
            with time_limit(seconds):
                section(self)
        except (Exception, SectionTimeoutError):
            self.record(kind="error", name=name, text=traceback.format_exc(limit=-6))
        try:
            self.release()
        except Exception:
            self.context_died = True
            self.record(kind="error", name=name, text=traceback.format_exc(limit=-6))
        self.record(kind="note", name="section", text=f"{time.monotonic() - start:.1f} s")

    def release(self) -> None:
        """Give back the memory of what is over, cycles too; raises if an error left the CUDA context dead."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise SectionTimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build() -> str:
    """Build the extension in place, with CUDA if that works."""
    result = ""
    for wanted in ("cuda", "cpu"):
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "-q"]
        environment = os.environ | {"NRT_FAST_EXT": wanted}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        result += f"NRT_FAST_EXT={wanted}: {'built' if done.returncode == 0 else done.stderr[-600:]}\n"
        if done.returncode == 0:
            break
    return result


def import_from_source() -> None:
    """Import the package from the source tree."""
    sys.path.insert(0, str(ROOT / "src"))
    folder = ROOT / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        "nrt_fast.triton_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    import nrt_fast  # noqa: F401, before what lies in it

    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def environment(device: str) -> dict[str, object]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "versions": versions,
    }


def table(records: list[dict]) -> str:
    """Every timing, then every check that failed and every section that raised."""
    lines = []
    for r in records:
        if r["kind"] == "time":
            floor = "" if r["of_floor"] is None else f"  floor {r['floor_us']:.1f} us, {100 * r['of_floor']:.1f}% of it"
            lines.append(f"{r['section']}: {r['name']}{floor}")
            ours = next(iter(r["us"].values()))
            lines += [f"  {us:12.1f} us  {us / ours:6.2f}x  {who}" for who, us in r["us"].items()]
        if r["kind"] == "speed":
            lines.append(f"{r['section']}: {r['name']}, {100 * r['of_roofline']:.1f}% of {r['roofline']:,.0f} tokens/s")
            lines += [f"  {speed:12,.0f} tokens/s  {who}" for who, speed in r["tokens_per_second"].items()]
    checks = [r for r in records if r["kind"] == "check"]
    failed = [r for r in checks if not r["passed"]]
    lines.append(f"{len(checks)} checks, {len(failed)} failed")
    lines += [f"FAILED {r['section']}: {r['name']}: error {r['error']:.3g} > {r['allowed']:.3g}" for r in failed]
    lines += [f"ERROR {r['section']}: {r['text'].strip().splitlines()[-1]}" for r in records if r["kind"] == "error"]
    return "\n".join(lines)


def go_on(state: dict[str, object]) -> None:
    """In a fresh process, which takes this one's place and with it the memory of a context that died."""
    _, path = tempfile.mkstemp(".json")
    Path(path).write_text(json.dumps(state))
    os.execv(sys.executable, [sys.executable, *sys.argv, "--go-on", path])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", help="their names; all, if none is given")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--build", action="store_true", help="build the extension and use this source tree")
    parser.add_argument("--peers", type=Path, help="folder of unpacked wheels")
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--go-on", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    state = {}
    if arguments.go_on:
        state = json.loads(arguments.go_on.read_text())
        arguments.go_on.unlink()
    start = state.get("start", time.monotonic())
    if arguments.peers:
        sys.path.append(str(arguments.peers))
    built = state.get("built") or (build() if arguments.build else None)
    if arguments.build:
        import_from_source()
    import gpu_sections  # now that the package can be imported

    from nrt_fast import ops

    suite = Suite(arguments.device, arguments.quick)
    suite.records += state.get("records", [])
    try:
        import gpu_engine  # noqa: F401, they add their sections
        import gpu_train  # noqa: F401
    except ImportError as error:  # it needs transformers
        suite.record(kind="note", name="engine", text=f"not measured: {error}")
    head = environment(arguments.device) | {"built": built, "ops": ops.backend(), "bandwidth": suite.bandwidth}
    over = {record["section"] for record in suite.records}

    def write() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(head | {"records": suite.records}, indent=1) + "\n")

    for name, (section, seconds) in gpu_sections.SECTIONS.items():
        if name in over or (arguments.sections and name not in arguments.sections):
            continue
        if time.monotonic() - start + seconds > MAX_SECONDS:
            suite.records.append({"section": name, "kind": "note", "name": name, "text": "skipped: no time left"})
            continue
        suite.run(name, section, seconds)
        write()
        if suite.context_died:
            go_on({"start": start, "built": built, "records": suite.records})
    write()
    print(table(suite.records))
    return int(any(r["kind"] == "error" or r.get("passed") is False for r in suite.records))


if __name__ == "__main__":
    sys.exit(main())
