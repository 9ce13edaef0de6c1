"""What cannot be trained ends with one clear line and exit code 2, and leaves what was written before valid."""

import errno
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from nrt_fast import Model, checkpoint, cli, loop
from nrt_fast.metrics import MetricsFile, read_metrics
from nrt_fast.starter import MODEL_DIR

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def refused(capsys, tiny_run, tmp_path):
    """Run the command on the tiny configuration with these fields; returns its one line of complaint."""

    def line(**fields):
        config = vars(tiny_run(**({"output_dir": tmp_path / "run"} | fields)))
        argv = [f"--{name}={value}" for name, value in config.items() if value not in (None, [])]
        code = cli.main(["train", *argv])
        err = capsys.readouterr().err
        assert code == 2, err
        assert err.startswith("nrt-fast: error: ") and err.count("\n") == 1, err
        return err.removeprefix("nrt-fast: error: ").rstrip("\n")

    return line


@pytest.fixture
def model(tmp_path):
    """A copy of the starter's folder, to be broken."""
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def poison(tensors, value):
    tensors["model.norm.weight"][3] = value


def cut_vocabulary(folder, size=100):
    edit_config(folder, vocab_size=size)
    edit_weights(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:size].clone()}))


BROKEN_MODELS = {
    "unknown model type": (
        lambda folder: edit_config(folder, model_type="gpt2"),
        "{}/config.json: model type 'gpt2' is not supported; valid: llama, mistral, qwen2, qwen3",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "{} has no config.json"),
    "config that is not JSON": (lambda folder: truncate(folder / "config.json"), "{}/config.json is not valid JSON: "),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "{} has neither model.safetensors nor"),
    "truncated weights": (
        lambda folder: truncate(folder / "model.safetensors"),
        "{}/model.safetensors is not a readable safetensors file: ",
    ),
    "missing tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "{}: tensor model.norm.weight is missing",
    ),
    "unexpected tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(1))),
        "{}: unexpected tensor extra",
    ),
    "misshapen tensor": (lambda folder: edit_config(folder, intermediate_size=7), "the config says [128, 7]"),
    "NaN": (
        lambda folder: edit_weights(folder, lambda tensors: poison(tensors, math.nan)),
        "{}: model.norm.weight holds NaN or Inf",
    ),
    "Inf": (
        lambda folder: edit_weights(folder, lambda tensors: poison(tensors, math.inf)),
        "{}: model.norm.weight holds NaN or Inf",
    ),
    "config that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "{}/config.json is no JSON object",
    ),
    "width that is text": (
        lambda folder: edit_config(folder, hidden_size="big"),
        "{}/config.json describes no model: ",
    ),
    "heads that do not divide the width": (
        lambda folder: edit_config(folder, num_attention_heads=7),
        "{}/config.json describes no model: ValueError('The hidden size (128) is not a multiple of",
    ),
    "no heads": (
        lambda folder: edit_config(folder, num_attention_heads=0, head_dim=None),
        "{}/config.json describes no model: ",
    ),
    "RoPE without its numbers": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}),
        "{}/config.json describes no model: ",
    ),
    "generation config that is not JSON": (
        lambda folder: truncate(folder / "generation_config.json"),
        "{}/generation_config.json is not valid JSON: ",
    ),
    "vocabulary mismatch": (cut_vocabulary, "but the model has 100 rows (ids 0 to 99)"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "{}: no tokenizer in this folder",
    ),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models_are_named(name, model, refused, tmp_path):
    broken, message = BROKEN_MODELS[name]
    broken(model)
    assert message.format(model) in refused(model_name_or_path=str(model))
    assert not (tmp_path / "run").exists(), "nothing is written before everything is read"


BAD_FIELDS = {
    "missing model": ({"model_name_or_path": "./nowhere"}, "model ./nowhere: no such folder"),
    "missing data": ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
    "long delimiter": ({"delimiter": "take 9"}, "delimiter 'take 9' is 2 tokens"),
    "limits over the context": (
        {"max_prompt_length": 200, "max_trace_length": 200},
        "max_prompt_length 200 + max_trace_length 200 + max_answer_length 16 + 1 delimiter do not fit",
    ),
    "limits under every row": ({"max_prompt_length": 2}, "all 10 rows are over the limits (the shortest prompt has"),
    "unknown device": ({"device": "abacus"}, "device 'abacus' is unknown; valid: auto, cpu, cuda, cuda:N"),
    "unsupported device": ({"device": "meta"}, "device 'meta' is not supported; valid: auto, cpu, cuda, cuda:N"),
    "unknown tracker": ({"report_to": "wandbee"}, "report_to 'wandbee' is unknown; valid: trackio, wandb, tensorboard"),
    "more held out than there is": ({"num_eval_prompts": 10}, "num_eval_prompts: 10 rows are to be held out, but"),
    "no checkpoint there": (
        {"resume_from_checkpoint": "./nowhere"},
        "resume_from_checkpoint ./nowhere: manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_named(name, refused, tmp_path):
    fields, message = BAD_FIELDS[name]
    assert message in refused(**fields)
    assert not (tmp_path / "run").exists(), "nothing is written before everything is read"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(refused):
    assert refused(device="cuda") == "device 'cuda': torch sees 0 CUDA devices here"


def test_a_tracker_that_is_not_installed(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refused(report_to="wandb") == "report_to wandb: it is not installed; pip install 'nrt-fast[trackers]'"
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    assert refused() == f"output_dir {tmp_path}/run is not empty and holds no run; choose an empty or new folder"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_run(refused, tiny_run, tmp_path):
    loop.train(tiny_run(tmp_path / "run"))
    assert "belongs to another run: seed was 0 there and is 1 now; choose another output_dir" in refused(seed=1)
    assert "belongs to another run: reward was None there and is 'gm' now" in refused(reward="gm")
    assert "resume_from_checkpoint is false, but" in refused(resume_from_checkpoint="false")
    (tmp_path / "run/run.json").write_text("{")
    assert f"{tmp_path}/run/run.json cannot be read" in refused()


def test_data_that_was_edited_since_the_checkpoint(refused, tiny_run, tmp_path):
    path, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    text = Path(tiny_run(run).dataset_name).read_text()
    path.write_text(text)
    loop.train(tiny_run(run, dataset_name=str(path), max_steps=1))
    path.write_text(text.replace('"answer": "', '"answer": "so '))
    assert refused(dataset_name=str(path), max_steps=2) == (
        f"the data changed since the checkpoint in {path}: [8] rows then, [8] now; valid: the data as it was, or "
        "another output_dir to start anew"
    )
    path.write_text(text)
    assert loop.train(tiny_run(run, dataset_name=str(path), max_steps=2))["steps"] == 2


@pytest.mark.parametrize("place", ["{}/file", "{}/file/deeper", "/proc/run"])
def test_output_folders_that_cannot_be(place, refused, tmp_path):
    (tmp_path / "file").touch()
    folder = place.format(tmp_path)
    assert refused(output_dir=folder).startswith(f"cannot write {folder}/run.json: ")


def test_weights_that_break_in_mid_run(refused, tmp_path, monkeypatch):
    step = loop.step

    def poisoned(run, progress):
        if progress.step == 3:
            run.model.weights.flat[7] = math.nan
        return step(run, progress)

    monkeypatch.setattr(loop, "step", poisoned)
    assert re.match(r"step 3: .*, row \d+: a log-probability of its answer is NaN", refused())
    run = tmp_path / "run"
    assert checkpoint.newest(run) == run / "checkpoint-2"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2]
    Model.from_pretrained(run / "checkpoint-2")


def test_a_loss_that_is_not_finite_is_told(refused, tmp_path):
    """A coefficient at the end of fp32 makes it infinite while every log-probability is fine."""
    assert "step 1: the loss is inf" in refused(answer_coef=3e38)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_disk_that_fills_up_in_a_checkpoint(refused, tiny_run, tmp_path, file_size_limit):
    """The limit lets everything pass but weights."""
    loop.train(tiny_run(tmp_path / "run", max_steps=1))
    with file_size_limit(1_000_000):
        line = refused(max_steps=2)
    run = tmp_path / "run"
    assert line == f"cannot write {run}/checkpoint-2: File too large; what was saved before is complete"
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-1"]
    assert loop.train(tiny_run(run, max_steps=2))["steps"] == 2


@pytest.mark.parametrize(("owner", "name"), [(MetricsFile, "write"), (pq, "write_table"), (loop, "replace_file")])
def test_a_disk_that_fills_up_elsewhere(owner, name, refused, tiny_run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, name, full)
    assert "the disk is full; what was saved before is complete" in refused(eval_steps=2)
    monkeypatch.undo()
    assert loop.train(tiny_run(tmp_path / "run", eval_steps=2))["steps"] == 3
