"""Any number of ranks makes the same run: samples, losses, weights, checkpoints; and a rank that fails is named."""

import os
import random
import re
import shutil
import signal
import time
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from ranks import Ranks, together, train_and_do
from safetensors.torch import load_file, save_file

from nrt_fast import checkpoint, cli, distributed, loop
from nrt_fast.metrics import read_metrics
from nrt_fast.optim import AdamW
from nrt_fast.reference.adamw import BLOCK
from nrt_fast.shares import deal
from nrt_fast.types import UserError

NUM_STEPS = 10
FIELDS = {
    "max_steps": NUM_STEPS, "prompts_per_step": 3, "eval_steps": 2, "save_steps": NUM_STEPS, "max_tokens_per_batch": 64,
    "adam_epsilon": 1e-6,  # with the default, rounding noise in a gradient of 0 would take full steps
}  # fmt: skip
VARIANTS = {
    "uneven": ({}, (2, 4)),  # 3 groups: 2 and 1, then a rank without any
    "LoRA, frozen baseline, minibatches": (
        {"use_peft": True, "lora_r": 4, "baseline": "frozen", "prompts_per_minibatch": 2}, (2,),
    ),
    "sft, one prompt": (
        {"objective": "sft", "max_trace_length": None, "num_generations": 8, "prompts_per_step": 1}, (2,),
    ),
}  # fmt: skip
SAMPLED = ("prompt", "completion")
SCHEDULE = {"nrt/rows_per_decode_step", "nrt/paused", "nrt/recomputed_tokens"}  # of each rank's own engine
EXACT_ZEROS = {"frac_reward_zero_std", "nrt/frac_clipped"}  # counts of rewards whose last bit decides
ROUNDING = ("nrt/dlogp", "nrt/score_audit")  # what they measure
STEEP = ("grad_norm", "nrt/grad_")  # of weights that are 1e-7 apart


def samples(folder):
    """What was sampled in every step with an evaluation."""
    tables = [pq.read_table(path).to_pydict() for path in sorted((folder / "completions").iterdir())]
    return [[table[column] for column in SAMPLED] for table in tables]


def flat_weights(folder):
    (path,) = (folder / "final").glob("*model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])


def assert_same_run(folder, other, measured, tolerance=1e-6):
    """Samples are the same; what is computed from them is, up to the rounding of sums."""
    assert samples(folder) == samples(other)
    for row, expected in zip(measured(folder), measured(other), strict=True):
        assert expected.keys() == {name for name in row if not name.startswith("comm/")}
        for name in expected.keys() - SCHEDULE - EXACT_ZEROS:
            allowed = 1e-4 if name.startswith(STEEP) else 1e-5 if name.startswith(ROUNDING) else tolerance
            assert row[name] == pytest.approx(expected[name], rel=10 * tolerance, abs=allowed), (row["step"], name)
    weights, expected = flat_weights(folder), flat_weights(other)
    assert (weights - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_ranks_makes_the_same_run(variant, tiny_run, tmp_path, measured):
    fields, sizes = VARIANTS[variant]
    loop.train(tiny_run(tmp_path / "1", **(FIELDS | fields)))
    for size in sizes:
        folder = tmp_path / str(size)
        together(size, tmp_path / f"errors {size}", loop.train, tiny_run(folder, **(FIELDS | fields)))
        assert_same_run(folder, tmp_path / "1", measured)
        assert checkpoint.newest(folder) == folder / f"checkpoint-{NUM_STEPS}"


def test_communication_is_what_theory_says(tiny_run, tmp_path):
    """The gradients are summed once and the weights gathered once: twice the parameters, fp32 both."""
    folder = tmp_path / "run"
    together(2, tmp_path / "errors", loop.train, tiny_run(folder, max_steps=2))
    num_parameters = sum(t.numel() for t in load_file(folder / "final/model.safetensors").values())
    for row in read_metrics(folder / "metrics.jsonl"):
        assert row["comm/gradients_bytes"] == row["comm/weights_bytes"] == 4 * num_parameters
        assert 0 < row["comm/host_bytes"] < 100_000
    parts = [load_file(path) for path in sorted((folder / "checkpoint-2").glob("optimizer-*"))]
    half = num_parameters // 2 // BLOCK * BLOCK
    assert [len(part["first"]) for part in parts] == [half, num_parameters - half]


def test_a_run_goes_on_with_any_number_of_ranks(tiny_run, tmp_path, measured):
    """SIGTERM comes to one rank of two, in step 3: both stop after it. One rank goes on, and so do three."""
    fields = FIELDS | {"max_steps": 6}
    loop.train(tiny_run(tmp_path / "whole", **fields))
    stop = partial(signal.raise_signal, signal.SIGTERM)
    together(2, tmp_path / "errors", train_and_do, tiny_run(tmp_path / "3", **fields), 3, 1, stop)
    assert [row["step"] for row in measured(tmp_path / "3")] == [1, 2, 3]
    assert checkpoint.newest(tmp_path / "3") == tmp_path / "3/checkpoint-3"
    shutil.copytree(tmp_path / "3", tmp_path / "1")
    loop.train(tiny_run(tmp_path / "1", **fields))
    together(3, tmp_path / "errors of 3", loop.train, tiny_run(tmp_path / "3", **fields))
    for name in ("1", "3"):
        assert_same_run(tmp_path / name, tmp_path / "whole", measured)


def train_unreadable(config):
    """Rank 1 cannot read the checkpoint's slices; what the first rank has checked before it goes for rank 0 alone."""
    if distributed.rank() == 1:
        checkpoint.safe_open = lambda *_, **__: (_ for _ in ()).throw(OSError(5, os.strerror(5)))
    loop.train(config)


def test_a_rank_that_cannot_read_its_slice_is_named(tiny_run, tmp_path):
    folder = tmp_path / "run"
    together(2, tmp_path / "errors", loop.train, tiny_run(folder, max_steps=1))
    ranks = Ranks(2, tmp_path / "errors again", train_unreadable, tiny_run(folder, max_steps=2))
    assert ranks.join(40) == [2, 2]
    told = r"rank 1: \S+/checkpoint-1/optimizer-00001-of-00002.safetensors is not a readable safetensors file: .*output"
    assert all(re.search(told, text) for text in ranks.errors()), ranks.errors()
    assert checkpoint.newest(folder) == folder / "checkpoint-1"


def upload_slowly(config, seconds, refused=False):
    """The hub is a stub that takes its time."""

    def upload(folder, config):
        time.sleep(seconds)
        if refused:
            raise UserError(f"{folder} could not be uploaded")
        (folder.parent / "uploaded").write_text(str(time.time()))

    loop.upload = upload
    on_first = distributed.on_first
    distributed.on_first = lambda call, *rest: None if call.__name__ == "check_account" else on_first(call, *rest)
    loop.train(config)


def test_an_upload_may_take_longer_than_a_rank_waits(tiny_run, tmp_path):
    """The other rank leaves before it. A finished run is uploaded in the same way."""
    folder = tmp_path / "run"
    for errors in ("errors", "errors again"):
        ranks = Ranks(
            2, tmp_path / errors, upload_slowly, tiny_run(folder, max_steps=1, push_to_hub=True), 6, timeout_s=4
        )
        ranks.processes[1].join()
        assert not (folder / "uploaded").exists()
        assert ranks.join() == [0, 0], ranks.errors()
        (folder / "uploaded").unlink()


def test_an_upload_that_fails_is_the_first_rank_s_error(tiny_run, tmp_path):
    config = tiny_run(tmp_path / "run", max_steps=1, push_to_hub=True)
    ranks = Ranks(2, tmp_path / "errors", upload_slowly, config, 0, True)
    assert ranks.join() == [2, 0]
    assert ranks.errors() == [f"{tmp_path}/run/final could not be uploaded\n", ""]
    assert (tmp_path / "run/summary.json").exists()


def hang():
    time.sleep(600)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise UserError("row 7: no")


def full_disk():
    def write(*_):
        raise OSError(28, os.strerror(28))

    checkpoint._write = write


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (die, r"rank 1 on \S+ gives no sign of life: it was killed, or its host was lost"),
        (hang, r"rank 1 on \S+ did not come to the loss within 5 s; its last was the engine's counts"),
        (refuse, r"rank 1: step 2: row 7: no"),
        (full_disk, r"rank 1: cannot write \S+/checkpoint-2: the disk is full; what"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_fails_is_named(act, told, tiny_run, tmp_path):
    """Every other rank ends too, with the reason; the checkpoint of the step before is whole, and there is no other."""
    folder = tmp_path / "run"
    ranks = Ranks(2, tmp_path / "errors", train_and_do, tiny_run(folder), 2, 1, act, timeout_s=5)
    assert ranks.join(40)[0] == 2, ranks.errors()
    assert re.search(told, ranks.errors()[0]), ranks.errors()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert checkpoint.problem(folder / "checkpoint-1") is None


# Without processes


@pytest.fixture
def as_rank(monkeypatch):
    """Stands in for a job: this process as one of several that say nothing to each other."""

    def become(rank, size):
        monkeypatch.setattr(distributed, "_job", SimpleNamespace(rank=rank, size=size, alone=False))

    return become


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_even_and_slices_whole(size, as_rank):
    rng = random.Random(size)
    for _ in range(50):
        costs = [rng.randrange(1, 1000) for _ in range(rng.randrange(20))]
        num_elements = rng.randrange(1, 9000)
        shares, slices = [], []
        for rank in range(size):
            as_rank(rank, size)
            shares.append(distributed.share(costs))
            slices.append(distributed.own_slice(num_elements, BLOCK))
        assert sorted(chain(*shares)) == list(range(len(costs)))
        loads = [sum(costs[position] for position in share) for share in shares]
        assert max(loads) <= sum(costs) / size + max(costs, default=0), "Graham's bound"
        assert [part.stop for part in slices[:-1]] == [part.start for part in slices[1:]]
        assert (slices[0].start, slices[-1].stop) == (0, num_elements)
        assert all(part.start % BLOCK == 0 for part in slices)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.int8])
def test_slices_of_three_ranks_are_read_by_two_and_by_one(moments, as_rank, tmp_path):
    """Moments, their scales and remainders, each number where it belongs."""
    generator = torch.Generator().manual_seed(0)

    def optimizer(rank, size):
        as_rank(rank, size)
        return AdamW(torch.ones(9001).bfloat16(), (), 0, (0.9, 0.95), 1e-15, 0.01, moments)

    for rank in range(3):
        own = optimizer(rank, 3).state()
        for tensor in own.values():
            tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator))
        save_file(own, tmp_path / f"optimizer-{rank + 1:05}-of-00003.safetensors")
    whole = checkpoint.load_slices(tmp_path, optimizer(0, 1).ranges())
    assert len(whole["first"]) == 9001 and whole["first"].dtype == moments
    for rank in range(2):
        own = optimizer(rank, 2)
        own.load_state(checkpoint.load_slices(tmp_path, own.ranges()))
        for name, tensor in own.state().items():
            assert torch.equal(tensor, whole[name][own.ranges()[name]]), name


def test_groups_are_dealt_with_the_longest_first(as_rank):
    as_rank(0, 3)
    examples = [SimpleNamespace(uid=uid) for uid in range(5)]
    engine = SimpleNamespace(trace_lengths={0: 1.0, 1: 9.0, 2: 5.0, 3: 7.0})
    assert deal(examples, engine) == [[1, 0], [3, 4], [2]]


def test_memory_and_communication_of_ranks(capsys):
    """The optimizer's state alone is shared; of twice the parameters each rank sends seven eighths."""
    parts = {}
    argv = ["estimate", "--device=cpu", "--device_memory_gib=8", "--dtype=float32"]
    for ranks in ([], ["--nodes=2", "--gpus=4", "--bus_bandwidth_gb_s=0.001"]):
        assert cli.main([*argv, *ranks]) == 0
        out = capsys.readouterr().out
        parts[len(ranks)] = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if " fp32" in line}
    assert parts[3]["gradients"] == parts[0]["gradients"]
    assert parts[3]["optimizer"] == pytest.approx(parts[0]["optimizer"] / 8, abs=1e-4)
    assert "communication of 8 ranks in one step, 1 optimizer step(s)\n  gradients           0.0025  GiB" in out
    num_bytes = 2 * 4 * 679_552 * 7 / 8
    assert f"  time             {num_bytes / 1e6:.3f} s on the wire at 0.001 GB/s" in out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["estimate"], "nrt-fast estimate is one process, but torchrun started 4; only train is several"),
        (["train", "--num_processes=2"], "num_processes is 2, but torchrun started 4; leave it out"),
        (["train", "--ddp_timeout=0"], "ddp_timeout is 0.0; it should be above 0"),
    ],
)
def test_bad_numbers_of_processes(argv, told, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(argv) == 2
    assert told in capsys.readouterr().err
