"""Every preset of the method trains, and every option of its objective does something."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from nrt_fast import loop, ops
from nrt_fast.completions import read_completions
from nrt_fast.config import PRESETS
from nrt_fast.starter import MODEL_DIR

OPTIONS = {
    "ema baseline": {"baseline": "ema"},
    "frozen baseline": {"baseline": "frozen"},
    "no baseline": {"reward": "gm", "baseline": "none", "reward_clip": "none", "std_floor": 0},
    "clip to [0, 1]": {"reward_clip": "unit", "reward": "logp"},
    "dr_grpo": {"advantage": "dr_grpo"},
    "rloo": {"advantage": "rloo"},
    "reinforce": {"trace_loss": "reinforce", "prompts_per_minibatch": 1},
    "ppo": {"trace_loss": "ppo", "prompts_per_minibatch": 1},
    "no trace loss": {"trace_loss": "none", "std_floor": None},
    "derived answer weight": {"answer_weight": "derived"},
    "answer weighted by reward": {"answer_weight": "reward"},
    "no answer loss": {"answer_coef": 0},
    "no format loss": {"format_coef": 0},
    "sequences": {"normalizer": "sequence"},
    "constant": {"normalizer": "constant"},
    "reward over weights": {"reward_scale": "weight"},
    "high floor": {"std_floor": 10},
    "cut traces": {"drop_cut_reward": True},
    "KL": {"beta": 0.1},
    "entropy": {"entropy_coef": 0.1},
    "minibatches": {"prompts_per_minibatch": 1},
    "temperature": {"temperature": 0.5},
    "cosine": {"lr_scheduler_type": "cosine"},
    "warm-up": {"warmup_steps": 2},
}


@pytest.fixture(scope="module")
def train(tiny_run, tmp_path_factory, measured):
    """Train three steps and return the metrics; groups count as signal whatever their spread, unless told otherwise."""

    def run(**fields):
        folder = tmp_path_factory.mktemp("preset")
        loop.train(tiny_run(folder, save_steps=9, **fields))
        return folder, measured(folder)

    return run


@pytest.fixture(scope="module")
def default(train):
    return train(std_floor=0.0)[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(train, preset, monkeypatch):
    fields = {}
    if preset == "sft":
        fields = {"max_trace_length": None, "num_generations": 8}
        greedy = ops.sample_logprob

        def answers_only(logits, uniform, temperature):
            assert temperature == 0, "sft samples no traces"
            return greedy(logits, uniform, temperature)

        monkeypatch.setattr(ops, "sample_logprob", answers_only)
    folder, rows = train(objective=preset, **fields)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0].keys() >= {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch"}
    assert ("completions/mean_length" in rows[0]) == (preset != "sft")
    before, after = (load_file(path / "model.safetensors") for path in (MODEL_DIR, folder / "final"))
    for name, tensor in before.items():
        assert torch.isfinite(after[name]).all()
        assert not torch.equal(after[name], tensor.float()), f"{name} was not trained"


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_run(train, default, name):
    _, rows = train(**({"std_floor": 0.0} | OPTIONS[name]))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    pairs = list(zip(rows, default, strict=True))
    assert any(row[metric] != old[metric] for row, old in pairs for metric in row.keys() & old.keys())


def test_kl_grows_from_zero(train):
    _, rows = train(std_floor=0.0, reward_clip="none", beta=0.1)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-5
    assert rows[2]["loss/kl"] > 0


def test_entropy_bonus_is_part_of_the_loss(train, default):
    _, rows = train(std_floor=0.0, entropy_coef=0.1)
    assert rows[0]["loss/entropy"] < 0
    assert rows[0]["loss"] == pytest.approx(default[0]["loss"] + rows[0]["loss/entropy"])


def test_loss_is_the_sum_of_its_terms(default):
    for row in default:
        assert row["loss"] == pytest.approx(sum(value for name, value in row.items() if name.startswith("loss/")))


def test_minibatches_are_optimiser_steps_with_a_real_ratio(train):
    """One optimiser step for each rollout has the ratio 1 whatever its range; of several, the later ones have not."""
    every_group = {"std_floor": 0.0, "reward_clip": "none"}
    narrow = {"epsilon": 0.001, "epsilon_high": 0.001}
    whole, whole_narrow = train(**every_group)[1], train(**every_group, **narrow)[1]
    _, parts = train(**every_group, prompts_per_minibatch=1)
    folder, parts_narrow = train(**every_group, **narrow, prompts_per_minibatch=1)
    assert load_file(folder / "checkpoint-3/optimizer.safetensors")["num_steps"].item() == 6
    assert whole == whole_narrow
    assert whole[0]["clip_ratio/region_mean"] == 0 < parts_narrow[0]["clip_ratio/region_mean"] <= 1
    assert parts[0]["loss/trace"] != parts_narrow[0]["loss/trace"]
    for row in parts_narrow:
        assert row["clip_ratio/low_min"] <= row["clip_ratio/low_mean"]
        assert row["clip_ratio/high_mean"] <= row["clip_ratio/high_max"]
        assert row["nrt/dlogp_max"] < 2e-5, "sampler and trainer are compared before the first of them"


def test_cut_traces_earn_what_an_empty_one_does(train):
    """Traces of one token end with the delimiter only if they are empty: nothing is left to tell them apart."""
    _, kept = train(std_floor=0.0, max_trace_length=1)
    _, dropped = train(std_floor=0.0, max_trace_length=1, drop_cut_reward=True)
    assert kept[0]["nrt/frac_no_signal"] < 1
    for row in dropped:
        assert row["completions/clipped_ratio"] > 0
        assert row["nrt/frac_clipped"] == row["nrt/frac_no_signal"] == 1


@pytest.mark.parametrize("baseline", ["frozen", "ema"])
def test_gain_is_that_of_the_current_weights_whatever_the_baseline(train, baseline):
    """Without a trace loss the baseline trains nothing: it is in the reward alone."""
    fields = {"trace_loss": "none", "learning_rate": 1e-2, "eval_steps": 3, "max_steps": 3}
    (folder, rows), (other_folder, others) = train(**fields), train(**fields, baseline=baseline)
    assert rows[2]["reward"] != others[2]["reward"]
    for name in ("nrt/gain", "nrt/hard_token_gain", "nrt/logp_no_trace", "nrt/answer_logp"):
        assert [row[name] for row in rows] == [row[name] for row in others], name
    gains, other_gains = ([row["gain"] for row in read_completions(path, 3)] for path in (folder, other_folder))
    assert gains == other_gains


def test_average_of_bfloat16_weights_moves(train):
    """A thousandth of an update is less than bfloat16 resolves."""
    folder, _ = train(baseline="ema", dtype="bfloat16")
    average = load_file(folder / "checkpoint-3" / "ema.safetensors")["flat"]
    initial = load_file(MODEL_DIR / "model.safetensors")
    moved = (average != average.bfloat16().float()).float().mean()
    assert average.dtype == torch.float32
    assert moved > 0.5, f"{moved:.0%} of {len(initial)} tensors' weights are between two bfloat16 numbers"


def test_summary_tells_the_configuration(train):
    folder, _ = train(objective="jepo", reward="gm")
    config = json.loads((folder / "summary.json").read_text())["config"]
    assert (config["objective"], config["reward"], config["prompts_per_minibatch"]) == ("jepo", "gm", 2)
