"""A run that was stopped or killed, and went on, equals one that never was."""

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nrt_fast import Model, UserError, checkpoint, loop
from nrt_fast.metrics import read_metrics

NUM_STEPS = 5
VARIANTS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "frozen baseline": {"baseline": "frozen"},
    "averaged baseline, bfloat16": {"baseline": "ema", "dtype": "bfloat16"},
    "minibatches, KL": {"prompts_per_minibatch": 1, "beta": 0.1},
    "LoRA": {"use_peft": True, "lora_r": 4, "recompute": "selective"},
    "LoRA, frozen baseline, KL, bfloat16": {
        "use_peft": True, "lora_target_modules": "q_proj,v_proj", "baseline": "frozen", "beta": 0.1,
        "dtype": "bfloat16",
    },
    "LoRA, averaged baseline": {"use_peft": True, "use_rslora": True, "baseline": "ema"},
    "sft, decay": {"objective": "sft", "max_trace_length": None, "num_generations": 8, "lr_scheduler_type": "linear"},
}  # fmt: skip
NUM_KILLS = 20


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def stop_in_every_step(config, monkeypatch):
    """Start the same run again and again; SIGTERM or SIGINT comes in each step. Returns what the last start returns."""
    step, signals = loop.step, [signal.SIGTERM, signal.SIGINT]

    def interrupted(run, progress):
        signal.raise_signal(signals[progress.step % 2])
        return step(run, progress)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", interrupted)
        results = [loop.train(config) for _ in range(NUM_STEPS)]
    assert results[:-1] == [{"steps": number, "stopped_on": []} for number in range(1, NUM_STEPS)]
    return results[-1]


def stop_in_step(number, patch):
    """SIGTERM comes in the step of this number."""
    step = loop.step

    def interrupted(run, progress):
        if progress.step == number:
            signal.raise_signal(signal.SIGTERM)
        return step(run, progress)

    patch.setattr(loop, "step", interrupted)


@pytest.fixture
def held_out(tmp_path):
    """Fields of a run whose held-out items are in a file of their own: a sum with each number."""

    def fields(*numbers):
        path = tmp_path / f"{'-'.join(map(str, numbers))}.jsonl"
        path.write_text("".join(f'{{"question": "take {n} plus 1 ?", "answer": "{n + 1} ."}}\n' for n in numbers))
        return {"num_eval_prompts": len(numbers)} | ({"eval_dataset_name": str(path)} if numbers else {})

    return fields


def change_state(folder, change):
    """Change a checkpoint's state; it is complete as before."""
    path, manifest = folder / "trainer_state.json", folder / "manifest.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {path.name: checkpoint.describe(path)}))


def assert_same_run(folder, other, measured):
    """Bitwise: all tensors of every checkpoint, metrics but for timings, completions, samples."""
    assert checkpoints(folder) == checkpoints(other)
    patterns = ("checkpoint-*/*.safetensors", "final/*", "completions/*", "samples.json")
    files = [path.relative_to(other) for pattern in patterns for path in other.glob(pattern)]
    assert len(files) > len(checkpoints(other))
    for path in files:
        assert (folder / path).read_bytes() == (other / path).read_bytes(), path
    assert measured(folder) == measured(other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_in_every_step_equals_an_uninterrupted_one(variant, tiny_run, tmp_path, monkeypatch, measured):
    fields = VARIANTS[variant] | {"max_steps": NUM_STEPS, "save_total_limit": NUM_STEPS, "eval_steps": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = loop.train(tiny_run(whole, **fields))
    summary = stop_in_every_step(tiny_run(stopped, **fields, save_steps=9), monkeypatch)
    for key in ("before", "after", "noise"):
        assert summary[key] == expected[key]
    assert_same_run(stopped, whole, measured)


def test_more_steps_go_on_from_the_end(tiny_run, tmp_path, finished, measured):
    """max_steps may grow; final/ and summary.json are then those of the longer run."""
    fields = {"save_total_limit": NUM_STEPS, "eval_steps": 2}
    loop.train(tiny_run(tmp_path / "run", max_steps=2, **fields))
    summary = loop.train(tiny_run(tmp_path / "run", max_steps=NUM_STEPS, **fields))
    assert summary["steps"] == NUM_STEPS
    assert_same_run(tmp_path / "run", finished, measured)


def test_a_summary_of_fewer_steps_is_no_end(tiny_run, tmp_path, finished):
    """Killed between its last checkpoint and its summary, a prolonged run has the summary of the shorter one."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "final")
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(summary.replace(f'"steps": {NUM_STEPS}', '"steps": 2'))
    assert loop.train(tiny_run(folder, max_steps=NUM_STEPS, eval_steps=2))["steps"] == NUM_STEPS
    assert (folder / "final/model.safetensors").exists()


def test_a_finished_run_says_so(tiny_run, finished, capsys, monkeypatch):
    monkeypatch.setattr(loop, "step", lambda *args: pytest.fail("there is nothing left to do"))
    summary = loop.train(tiny_run(finished, max_steps=NUM_STEPS, eval_steps=2))
    assert summary["steps"] == NUM_STEPS
    assert capsys.readouterr().out.endswith(f"\n{finished} is finished (5 steps); see {finished}/summary.json\n")


def damage_by_truncation(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_one_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [damage_by_truncation, damage_by_one_bit, lambda folder: (folder / "manifest.json").unlink()],
    ids=["truncated", "one bit", "no manifest"],
)
def test_the_newest_complete_checkpoint_counts(damage, tiny_run, tmp_path, finished, measured, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("final", "summary.json"))
    damage(folder / "checkpoint-5")
    assert checkpoint.newest(folder) == folder / "checkpoint-4"
    assert f"{folder}/checkpoint-5 is passed over: " in caplog.text
    loop.train(tiny_run(folder, max_steps=NUM_STEPS, eval_steps=2, save_total_limit=NUM_STEPS))
    assert_same_run(folder, finished, measured)


def test_a_checkpoint_to_start_from_is_left_behind(tiny_run, tmp_path, finished, measured, monkeypatch, capsys, caplog):
    """The same command goes on, and says so of a finished run: no step is made twice, no checkpoint is lost."""
    folder, start = tmp_path / "run", finished / "checkpoint-1"
    config = tiny_run(
        folder, max_steps=NUM_STEPS, eval_steps=2, save_total_limit=NUM_STEPS, resume_from_checkpoint=str(start)
    )
    for number in (2, 3):
        with monkeypatch.context() as patch:
            stop_in_step(number, patch)
            assert loop.train(config)["steps"] == number
    assert f"{start} is passed over: {folder}/checkpoint-2 is later" in caplog.text
    assert loop.train(config)["steps"] == NUM_STEPS
    assert measured(folder) == measured(finished)[1:]
    assert checkpoints(folder) == checkpoints(finished)[1:]
    loop.train(config)
    assert f"{folder} is finished (5 steps)" in capsys.readouterr().out


def test_an_earlier_checkpoint_of_its_own_does_not_take_a_run_back(tiny_run, tmp_path, finished, measured, monkeypatch):
    """Another folder does, and the first course stays."""
    step, steps = loop.step, []
    monkeypatch.setattr(loop, "step", lambda run, progress: steps.append(progress.step) or step(run, progress))
    folder, fields = tmp_path / "run", {"eval_steps": 2, "save_total_limit": NUM_STEPS, "max_steps": NUM_STEPS}
    shutil.copytree(finished, folder)
    fields["resume_from_checkpoint"] = str(folder / "checkpoint-2")
    assert loop.train(tiny_run(folder, **fields | {"max_steps": NUM_STEPS + 1}))["steps"] == NUM_STEPS + 1
    assert steps == [NUM_STEPS + 1]
    loop.train(tiny_run(tmp_path / "back", **fields))
    assert steps == [NUM_STEPS + 1, 3, 4, 5]
    assert measured(tmp_path / "back") == measured(finished)[2:]


@pytest.mark.parametrize(
    ("fields", "steps", "told"),
    [
        ({"lr_scheduler_type": "linear"}, (2, 4), "step 3 is 0.0005 instead of 0"),
        ({"warmup_steps": 0.5}, (4, 8), "step 3 is 0.00075 instead of 0.001"),
        ({"warmup_steps": 3, "lr_scheduler_type": "cosine"}, (4, 6), "step 5 is 0.00075 instead of 0"),
        ({"warmup_steps": 2}, (2, 4), None),
        ({"warmup_steps": 0.5}, (4, 4), None),
    ],
    ids=["decay of a finished run", "back into the warm-up", "later", "constant", "as long"],
)
def test_a_schedule_that_follows_the_length_is_told(fields, steps, told, tiny_run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(2, patch)
        loop.train(tiny_run(tmp_path, max_steps=steps[0], **fields))
    capsys.readouterr()
    loop.train(tiny_run(tmp_path, max_steps=steps[1], **fields))
    start = f"max_steps was {steps[0]} and is {steps[1]}, which the schedule follows: the learning rate of "
    lines = [line.removeprefix(start) for line in capsys.readouterr().out.splitlines() if line.startswith("max_steps")]
    assert lines == ([told] if told else [])
    if told:
        _, step, _, rate, *_ = told.split()
        assert read_metrics(tmp_path / "metrics.jsonl")[int(step) - 1]["learning_rate"] == pytest.approx(float(rate))


def test_a_checkpoint_of_another_folder_starts_a_new_one(tiny_run, tmp_path, finished, measured):
    config = tiny_run(
        tmp_path / "run", max_steps=NUM_STEPS, eval_steps=2, resume_from_checkpoint=str(finished / "checkpoint-3")
    )
    loop.train(config)
    assert measured(tmp_path / "run") == measured(finished)[3:]


@pytest.mark.parametrize("then", [0, 3])
@pytest.mark.parametrize("with_hash", [True, False], ids=["", "of an older version"])
def test_other_held_out_items_are_measured_anew(then, with_hash, held_out, tiny_run, tmp_path, capsys):
    """Under the weights of the checkpoint, which are those that a run of no further step ends with."""
    loop.train(tiny_run(tmp_path / "from", max_steps=1, **held_out(*range(then))))
    start = tmp_path / "from/checkpoint-1"
    if not with_hash:
        change_state(start, lambda state: state["progress"].pop("heldout_sha256"))
    fields = {"resume_from_checkpoint": str(start), **held_out(1, 2)}
    same = loop.train(tiny_run(tmp_path / "same", max_steps=1, **fields))
    assert same["before"] == same["after"] and same["before"]["num_items"] == 2
    capsys.readouterr()
    further = loop.train(tiny_run(tmp_path / "further", max_steps=2, **fields))
    told = f"the held-out items are not those of {start}: measuring the 2 of now under the weights of step 1, as those"
    assert told in capsys.readouterr().out
    assert further["before"] == same["before"] != further["after"]
    kept = json.loads((tmp_path / "further/samples.json").read_text())
    assert [len(kept[when]) for when in ("before", "after")] == [2, 2]
    loop.train(tiny_run(tmp_path / "further", max_steps=3, **fields))
    assert told not in capsys.readouterr().out


def test_as_many_other_held_out_items_are_measured_too(held_out, tiny_run, tmp_path):
    """And where nothing is held out any more, there is nothing before."""
    loop.train(tiny_run(tmp_path / "from", max_steps=1, **held_out(0, 1)))
    start = {"resume_from_checkpoint": str(tmp_path / "from/checkpoint-1")}
    summary = loop.train(tiny_run(tmp_path / "run", max_steps=1, **held_out(1, 2), **start))
    assert summary["before"] == summary["after"]
    kept = json.loads((tmp_path / "run/samples.json").read_text())
    assert {sample["question"] for sample in kept["before"]} == {"take 1 plus 1 ?", "take 2 plus 1 ?"}
    summary = loop.train(tiny_run(tmp_path / "none", max_steps=2, **held_out(), **start))
    assert summary["before"] == summary["after"] == {}


def test_home_is_expanded_in_the_folder_and_in_the_checkpoint(tiny_run, finished, monkeypatch, tmp_path, measured):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "from")
    config = tiny_run("~/run", max_steps=NUM_STEPS, eval_steps=2, resume_from_checkpoint="~/from/checkpoint-3")
    loop.train(config)
    assert measured(tmp_path / "run") == measured(finished)[3:]
    assert not (tmp_path / "~").exists()


def test_a_step_over_the_end_of_a_pass_resumes(tiny_run, tmp_path, monkeypatch, measured):
    """8 rows in steps of 5: a row that comes twice waits, and a checkpoint keeps it."""
    fields = {"max_steps": NUM_STEPS, "save_total_limit": NUM_STEPS, "prompts_per_step": 5}
    loop.train(tiny_run(tmp_path / "whole", **fields))
    stop_in_every_step(tiny_run(tmp_path / "stopped", **fields), monkeypatch)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", measured)
    states = [json.loads(path.read_text()) for path in tmp_path.glob("whole/checkpoint-*/trainer_state.json")]
    assert any(state["order"]["put_off"] != [[]] for state in states)


def test_a_checkpoint_of_another_objective_is_refused(tiny_run, tmp_path, finished):
    config = tiny_run(tmp_path / "run", baseline="ema", resume_from_checkpoint=str(finished / "checkpoint-3"))
    with pytest.raises(UserError, match=r"checkpoint-3 has no ema\.safetensors: it is of another objective"):
        loop.train(config)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=" to ".join)
def test_a_checkpoint_in_another_dtype_is_refused(dtypes, tiny_run, tmp_path):
    """The fp32 master of bf16 weights is their remainder: there is none to begin with, or it would be lost."""
    before, now = dtypes
    loop.train(tiny_run(tmp_path / "before", max_steps=1, dtype=before))
    config = tiny_run(tmp_path / "now", dtype=now, resume_from_checkpoint=str(tmp_path / "before/checkpoint-1"))
    with pytest.raises(UserError, match=f"the checkpoint's weights are {before}, this run's {now}; dtype decides"):
        loop.train(config)


def command(config, *argv):
    fields = ("dataset_name", "output_dir", "max_trace_length", "num_eval_prompts", "prompts_per_step", "max_steps")
    options = [f"--{name}={getattr(config, name)}" for name in fields]
    return [sys.executable, "-m", "nrt_fast.cli", "train", *options, *argv]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_command(number, tiny_run, tmp_path):
    folder = tmp_path / "run"
    argv = command(tiny_run(folder, max_steps=10_000), "--save_steps=10000")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and read_metrics(folder / "metrics.jsonl"))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    steps = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert out.endswith(f"stopped after step {steps}, saved; the same command goes on from there\n")
    assert checkpoint.newest(folder) == folder / f"checkpoint-{steps}"


@pytest.fixture(scope="module")
def start():
    """Starter of runs in processes of their own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nrt_fast.loop", "transformers.models.llama.configuration_llama"])

    def process(target, *args):
        child = context.Process(target=target, args=args)
        child.start()
        return child

    process(bool).join()
    return process


def last_step(folder):
    return max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)


def saved_step(folder):
    newest = checkpoint.newest(folder)
    return int(newest.name.split("-")[1]) if newest else 0


def test_kills_at_random_moments_lose_at_most_a_step(start, tiny_run, tmp_path, measured):
    fields = {"max_steps": 12, "eval_steps": 4}
    whole, rng, num_kills = tmp_path / "whole", random.Random(0), 0
    began = time.monotonic()
    start(loop.train, tiny_run(whole, **fields)).join()
    duration = time.monotonic() - began
    while num_kills < NUM_KILLS:
        folder = tmp_path / f"killed after {num_kills}"
        while not (folder / "summary.json").exists():
            process = start(loop.train, tiny_run(folder, **fields))
            process.join(rng.uniform(0, duration / 2) if num_kills < NUM_KILLS else None)
            process.kill()
            process.join()
            num_kills += process.exitcode == -signal.SIGKILL
            assert saved_step(folder) >= last_step(folder) - 1
            for path in folder.glob("checkpoint-*"):
                assert checkpoint.problem(path) is None
                Model.from_pretrained(path)
        assert_same_run(folder, whole, measured)
