"""Every file of examples/ does what it says, on the starter or on a tiny model of the named kind."""

import runpy
import shutil
from pathlib import Path

import pytest
from transformers import MistralConfig

from nrt_fast import arguments, cli, loop
from nrt_fast.starter import MODEL_DIR

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {
    "custom_data.py", "custom_reward.py", "lora_24gb.yaml", "mistral.yaml", "multi_gpu.yaml", "resume.py",
    "trl_reward.py",
}  # fmt: skip
SMALL = {"max_trace_length": 16, "num_eval_prompts": 16, "prompts_per_step": 4, "warmup_steps": 0}


def main_of(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def config_of(name, **changes):
    argv = ["--config", str(EXAMPLES / name)]
    for field, value in changes.items():
        argv += [f"--{field}", str(value)]
    return arguments.parse(argv, cli.COMMANDS["train"].arguments)[0]


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == TESTED


def test_custom_reward_rises():
    means = main_of("custom_reward.py")(num_steps=6)
    assert sum(means[3:]) > sum(means[:3])


def test_custom_data(tmp_path):
    summary = main_of("custom_data.py")(tmp_path, num_rows=40, max_steps=2, **SMALL)
    assert summary["steps"] == 2
    assert summary["after"]["num_items"] == 16
    assert summary["config"]["prompt_field"] == "case.text"


def test_resume_makes_the_same_weights(tiny_run, tmp_path, capsys):
    fields = {name: value for name, value in tiny_run("").given.items() if name not in ("output_dir", "max_steps")}
    assert main_of("resume.py")(tmp_path, num_steps=2, **fields)
    assert "the weights are the same" in capsys.readouterr().out


def test_trl_reward_rises(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed; pip install nrt-fast[trl] has it")
    rewards = main_of("trl_reward.py")(str(tmp_path), num_steps=6)
    assert len(rewards) == 6
    assert sum(rewards[3:]) > sum(rewards[:3])


def test_eight_gpus_hold_what_one_does_not(llama_folder):
    argv = ["--config", str(EXAMPLES / "multi_gpu.yaml"), "--model_name_or_path", str(llama_folder("3b"))]
    assert config_of("multi_gpu.yaml").num_processes == 8
    assert cli.main(["estimate", *argv, "--device_memory_gib", "36"]) == 0
    assert cli.main(["estimate", *argv, "--device_memory_gib", "36", "--gpus", "1"]) == 2


def test_mistral(make_module, tiny_run, tmp_path):
    """The file's choices on a random model of that kind with the starter's tokenizer; sizes, device and data apart."""
    folder = tmp_path / "mistral"
    make_module("mistral", vocab_size=512, sliding_window=None).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    sizes = tiny_run(tmp_path / "run").given | {"max_steps": 2, "learning_rate": 1e-6}
    summary = loop.train(config_of("mistral.yaml", **sizes, model_name_or_path=folder))
    assert summary["config"]["lr_scheduler_type"] == "cosine"
    assert (tmp_path / "run/final/config.json").read_text().count("MistralForCausalLM") == 1


@pytest.mark.parametrize(("size", "code"), [("3b", 0), ("8b", 2)])
def test_what_fits_a_card_of_24_gb(size, code, llama_folder):
    argv = ["--config", str(EXAMPLES / "lora_24gb.yaml"), "--model_name_or_path", str(llama_folder(size))]
    assert cli.main(["estimate", *argv, "--device_memory_gib", "23.5"]) == code


def test_mistral_fits_a_card_of_141_gb(tmp_path):
    shape = {"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None}
    MistralConfig(**shape, **heads).save_pretrained(tmp_path)
    argv = ["--config", str(EXAMPLES / "mistral.yaml"), "--model_name_or_path", str(tmp_path)]
    assert cli.main(["estimate", *argv, "--device_memory_gib", "139"]) == 0


def test_lora_trains_an_adapter(tiny_run, tmp_path):
    """The file's choices on the starter; sizes, device and data apart."""
    sizes = tiny_run(tmp_path / "run").given | {"max_steps": 1, "learning_rate": 2e-5}
    summary = loop.train(config_of("lora_24gb.yaml", **sizes, model_name_or_path=MODEL_DIR))
    assert (summary["config"]["lora_r"], summary["config"]["lora_alpha"]) == (16, 32)
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()
