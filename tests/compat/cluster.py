"""Several hosts, and processes that are killed: what takes too long for ``make test``. ``make cluster`` runs it.

Hosts are network namespaces that a virtual cable joins (root is needed), each with a torchrun of its own. Every check
compares with a run that one process made without a break; figures are printed as they come.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow.parquet as pq
from ranks import Ranks, train_timed
from safetensors.torch import load_file

from nrt_fast import checkpoint, loop
from nrt_fast.config import TrainConfig
from nrt_fast.metrics import read_metrics

HOSTS = {"nrt-a": "10.77.0.1", "nrt-b": "10.77.0.2"}
PORT = 29477
NUM_KILLS = 20
FIELDS = {
    "max_steps": 10, "prompts_per_step": 3, "num_generations": 3, "max_prompt_length": 64, "max_trace_length": 12,
    "max_answer_length": 16, "num_eval_prompts": 4, "eval_steps": 1, "save_steps": 2, "learning_rate": 1e-3,
    "warmup_steps": 0, "adam_epsilon": 1e-6, "device": "cpu", "dtype": "float32",
}  # fmt: skip


def samples(folder: Path) -> list:
    tables = [pq.read_table(path).to_pydict() for path in sorted((folder / "completions").iterdir())]
    return [[table["prompt"], table["completion"]] for table in tables]


def assert_same_run(folder: Path, whole: Path) -> float:
    """Samples are the same, weights within 1e-6; returns how far those are apart."""
    assert samples(folder) == samples(whole), folder
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, FIELDS["max_steps"] + 1))
    found, expected = (load_file(path / "final/model.safetensors") for path in (folder, whole))
    apart = max(float((found[name] - t).norm() / t.norm()) for name, t in expected.items())
    assert apart <= 1e-6, apart
    return apart


def step_of(folder: Path) -> int:
    return max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)


def saved_step(folder: Path) -> int:
    newest = checkpoint.newest(folder)
    return int(newest.name.split("-")[1]) if newest else 0


def wait_for(condition, seconds: float = 240) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - started


# Hosts


def ip(*arguments: str, may_fail: bool = False) -> None:
    subprocess.run(["ip", *arguments], check=not may_fail, capture_output=may_fail)


@contextmanager
def hosts():
    """Two network namespaces with a cable between them and no other way out."""
    (a, address_a), (b, address_b) = HOSTS.items()
    for name in HOSTS:
        ip("netns", "del", name, may_fail=True)
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    try:
        ip("link", "add", "nrt0", "netns", a, "type", "veth", "peer", "name", "nrt0", "netns", b)
        for name, address in ((a, address_a), (b, address_b)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "nrt0")
            ip("-n", name, "link", "set", "nrt0", "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name, may_fail=True)


def start_host(name: str, folder: Path, log: Path, *options: str) -> subprocess.Popen:
    """A torchrun with one process in a namespace, which leads a process group."""
    fields = [f"--{key}={value}" for key, value in FIELDS.items()]
    argv = [
        "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", "--rdzv-id=cluster", f"--rdzv-endpoint={HOSTS['nrt-a']}:{PORT}",
        f"--rdzv-conf=is_host={name == 'nrt-a'}", f"--local-addr={HOSTS[name]}", *options, "-m", "nrt_fast", "train",
        *fields, f"--output_dir={folder}",
    ]  # fmt: skip
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "nrt0", "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        return subprocess.Popen(argv, env=environment, stdout=file, stderr=file, start_new_session=True)


def all_of(host: subprocess.Popen) -> list[int]:
    """Processes below a host's; torchrun's children lead sessions of their own."""
    found, pending = [], [host.pid]
    while pending:
        found.append(pending.pop())
        children = Path(f"/proc/{found[-1]}/task/{found[-1]}/children")
        pending += map(int, children.read_text().split()) if children.exists() else []
    return found


def end(host: subprocess.Popen) -> None:
    """What a loss of power does: no process of it says anything any more."""
    for pid in all_of(host):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    host.wait()


def end_together(running: list[subprocess.Popen], logs: dict[str, Path]) -> None:
    """Wait for two hosts to end well."""
    codes = [host.wait(300) for host in running]
    assert codes == [0, 0], "\n".join([str(codes), *(log.read_text()[-4000:] for log in logs.values())])


def error_in(log: Path) -> str:
    return next((line for line in log.read_text().splitlines() if "nrt-fast: error:" in line), "no error is told")


def check_two_hosts(scratch: Path, whole: Path) -> None:
    folder, logs = scratch / "two hosts", {name: scratch / f"{name}.log" for name in HOSTS}
    with hosts():
        end_together([start_host(name, folder, logs[name]) for name in HOSTS], logs)
    print(f"two hosts: the same samples; weights apart by {assert_same_run(folder, whole):.1e}")


def check_lost_host(scratch: Path, whole: Path, lost: str, how: str) -> None:
    """A host is killed, or its cable is pulled, in step 5: the other ends and says so; both started again go on."""
    folder, logs = scratch / f"lost {lost} {how}", {name: scratch / f"{name} {how} {lost}.log" for name in HOSTS}
    other = next(name for name in HOSTS if name != lost)
    with hosts():
        running = {name: start_host(name, folder, logs[name]) for name in HOSTS}
        wait_for(lambda: step_of(folder) >= 4)
        if how == "killed":
            end(running[lost])
        else:
            ip("-n", lost, "link", "set", "nrt0", "down")
        seconds = wait_for(lambda: error_in(logs[other]) != "no error is told", 90)
        code = running[other].wait(90)
        assert code != 0 and seconds < 60, (code, seconds)
        for host in running.values():
            end(host)
        saved = saved_step(folder)
        assert saved >= 2 and checkpoint.problem(folder / f"checkpoint-{saved}") is None
        print(f"{lost} {how}: {other} ends after {seconds:.0f} s: {error_in(logs[other])}")
    with hosts():
        end_together([start_host(name, folder, logs[name]) for name in HOSTS], logs)
    print(f"{lost} {how}: started again from step {saved}, weights apart by {assert_same_run(folder, whole):.1e}")


def check_restart(scratch: Path, whole: Path) -> None:
    """torchrun --max-restarts starts the ranks again after one of them is killed; they go on from the checkpoint."""
    folder, logs = scratch / "restarted", {name: scratch / f"{name} restarted.log" for name in HOSTS}
    with hosts():
        running = {name: start_host(name, folder, logs[name], "--max-restarts=3") for name in HOSTS}
        wait_for(lambda: step_of(folder) >= 4)
        os.kill(all_of(running["nrt-b"])[-1], signal.SIGKILL)
        end_together(list(running.values()), logs)
    print(f"a rank killed under --max-restarts: weights apart by {assert_same_run(folder, whole):.1e}")


# One machine


def check_launcher(scratch: Path, whole: Path) -> None:
    """nrt-fast train --num_processes 2, Ctrl-C after step 4: both stop after one step, saved; the same goes on."""
    folder = scratch / "launched"
    fields = [f"--{key}={value}" for key, value in (FIELDS | {"save_steps": 10}).items()]
    argv = [sys.executable, "-m", "nrt_fast", "train", "--num_processes=2", *fields, f"--output_dir={folder}"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: step_of(folder) >= 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    step = step_of(folder)
    assert process.returncode == 128 + signal.SIGINT and saved_step(folder) == step, (process.returncode, err)
    assert out.count(f"stopped after step {step}, saved") == 1, out
    assert subprocess.run(argv, capture_output=True).returncode == 0
    print(f"--num_processes 2, Ctrl-C: saved after step {step}; weights apart by {assert_same_run(folder, whole):.1e}")


# Kills


def check_kills(scratch: Path, whole: Path, seconds: float) -> None:
    """A random rank of two, three or one is killed at a random moment, again and again."""
    rng, num_kills, lost = random.Random(0), 0, []
    while num_kills < NUM_KILLS:
        folder = scratch / f"killed after {num_kills}"
        for attempt in range(1000):
            size = rng.choice([1, 2, 3])
            config = TrainConfig(**FIELDS, output_dir=str(folder))
            before = saved_step(folder)
            ranks = Ranks(size, scratch / f"errors {num_kills} {attempt}", loop.train, config)
            victim = rng.choice(ranks.processes)
            victim.join(rng.uniform(0, seconds) if num_kills < NUM_KILLS else None)
            victim.kill()
            codes = ranks.join(60)
            if codes == [0] * size:
                break
            num_kills += -signal.SIGKILL in codes
            assert all(code in (2, -signal.SIGKILL) for code in codes), (codes, ranks.errors())
            saved = saved_step(folder)
            assert saved >= before, "a checkpoint was lost"
            lost.append(step_of(folder) - saved)
            for path in folder.glob("checkpoint-*"):
                assert checkpoint.problem(path) is None, path
        assert_same_run(folder, whole)
    assert max(lost) <= FIELDS["save_steps"]
    print(f"{num_kills} kills: at most {max(lost)} steps made again, every checkpoint whole, the same run at the end")


def check_overhead(scratch: Path) -> None:
    """The same total work by one process and by two, in processor time: other work on the machine changes it least."""
    for num_prompts, size in product((16, 64), (1, 2)):
        folder = scratch / f"timed {num_prompts} {size}"
        fields = FIELDS | {
            "max_steps": 6, "prompts_per_step": num_prompts, "num_generations": 8, "max_trace_length": 40,
            "eval_steps": 0, "save_steps": 100, "num_eval_prompts": 0,
        }  # fmt: skip
        config = TrainConfig(**fields, output_dir=str(folder))
        ranks = Ranks(size, scratch / f"errors of {folder.name}", train_timed, config, scratch)
        assert ranks.join(600) == [0] * size, ranks.errors()
        rows = read_metrics(folder / "metrics.jsonl")[1:]
        busy = " + ".join(f"{float((scratch / f'{rank}.seconds').read_text()):.3f}" for rank in range(size))
        wall = sum(row["step_time"] for row in rows) / len(rows)
        print(f"{size} process(es), starter, {num_prompts} x 8 traces: {busy} processor s a step, {wall:.3f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", default=["launcher", "hosts", "lost", "restart", "kills", "overhead"])
    checks = parser.parse_args().checks
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        started = time.monotonic()
        assert Ranks(1, scratch / "errors", bool).join() == [0]
        imported = time.monotonic()
        assert Ranks(1, scratch / "errors whole", loop.train, whole_config(scratch)).join() == [0]
        seconds, whole = time.monotonic() - imported, scratch / "whole"
        print(
            f"one process: {seconds:.1f} s for {FIELDS['max_steps']} steps, after {imported - started:.1f} s of imports"
        )
        if "launcher" in checks:
            check_launcher(scratch, whole)
        if "hosts" in checks:
            check_two_hosts(scratch, whole)
        if "lost" in checks:
            check_lost_host(scratch, whole, "nrt-b", "killed")
            check_lost_host(scratch, whole, "nrt-a", "killed")
            check_lost_host(scratch, whole, "nrt-b", "cut off")
        if "restart" in checks:
            check_restart(scratch, whole)
        if "kills" in checks:
            check_kills(scratch, whole, seconds)
        if "overhead" in checks:
            check_overhead(scratch)


def whole_config(scratch: Path) -> TrainConfig:
    return TrainConfig(**FIELDS, output_dir=str(scratch / "whole"))


if __name__ == "__main__":
    main()
