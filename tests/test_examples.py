"""Every file of examples/ does what it says, on the starter or on a tiny model of the named kind."""

import runpy
import shutil
from pathlib import Path

import pytest

from nrt_fast import cli, loop
from nrt_fast.config import TrainConfig
from nrt_fast.plan import GIB
from nrt_fast.run import estimate
from nrt_fast.starter import MODEL_DIR

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {"custom_data.py", "custom_reward.py", "lora_24gb.yaml", "mistral.yaml", "resume.py"}
SMALL = {"max_trace_length": 16, "num_eval_prompts": 16, "prompts_per_step": 4, "warmup_steps": 0}


def main_of(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def config_of(name, **changes):
    argv = ["--config", str(EXAMPLES / name)]
    for field, value in changes.items():
        argv += [f"--{field}", str(value)]
    return cli.parse(argv, cli.COMMANDS["train"].arguments)[0]


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir()} == TESTED


def test_custom_reward_rises():
    means = main_of("custom_reward.py")(num_steps=6)
    assert sum(means[3:]) > sum(means[:3])


def test_custom_data(tmp_path):
    summary = main_of("custom_data.py")(tmp_path, num_rows=40, max_steps=2, **SMALL)
    assert summary["steps"] == 2
    assert summary["after"]["num_items"] == 16
    assert summary["config"]["prompt_field"] == "case.text"


def test_resume_makes_the_same_weights(tmp_path, capsys):
    assert main_of("resume.py")(tmp_path, num_steps=2, **SMALL)
    assert "the weights are the same" in capsys.readouterr().out


def test_mistral(make_module, tiny_run, tmp_path):
    """The file's choices on a random model of that kind with the starter's tokenizer; sizes, device and data apart."""
    folder = tmp_path / "mistral"
    make_module("mistral", vocab_size=512, sliding_window=None).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    tiny = tiny_run(tmp_path / "run")
    sizes = {name: value for name, value in tiny.given.items() if name != "learning_rate"}
    config = config_of("mistral.yaml", **sizes | {"model_name_or_path": folder, "max_steps": 2})
    summary = loop.train(config)
    assert summary["config"]["learning_rate"] == 1e-6
    assert (tmp_path / "run/final/config.json").read_text().count("MistralForCausalLM") == 1


