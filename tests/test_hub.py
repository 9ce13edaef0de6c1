"""The card of a finished model, and its upload where that is asked for. The hub is a stub: nothing is sent."""

import json
import re

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from nrt_fast import UserError, cli
from nrt_fast.config import TrainConfig
from nrt_fast.loop import train
from nrt_fast.model_card import model_card


@pytest.fixture
def hub(monkeypatch):
    """Stands in for HfApi; notes its calls."""
    calls = []

    class Stub:
        def whoami(self):
            calls.append(("whoami",))

        def create_repo(self, name, **options):
            calls.append(("create_repo", name, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name if '/' in name else f'me/{name}'}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload_folder", repo_id, sorted(path.name for path in folder_path.iterdir())))

    Stub.calls = calls
    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return Stub


def refuse(*args, **kwargs):
    raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand was not found")


def summary(finished, **config):
    found = json.loads((finished / "summary.json").read_text())
    return found | {"config": found["config"] | config}


# The card


def test_every_final_has_a_card(finished):
    card, found = ModelCard.load(finished / "final/README.md"), summary(finished)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"nrt-fast", "nrt-ws"} <= set(card.data.tags)
    assert card.data.base_model is None and card.data.datasets is None
    before, after = (f"{found[when]['gain']:.3f} ± {found[when]['gain_error']:.3f}" for when in ("before", "after"))
    assert f"| gain | {before} | {after} |" in card.text
    assert "trained for 5 steps on `questions.jsonl`" in card.text
    assert "ends its thoughts with `</think>`" in card.text
    assert "| reward | ws_log |" in card.text and "| learning_rate | 0.001 |" in card.text
    for name, version in found["versions"].items():
        assert f"{name} {version}" in card.text
    assert "2602.11549" in card.text and "@inproceedings" in card.text


def test_it_tells_no_path_and_no_time(finished):
    text = (finished / "final/README.md").read_text()
    assert "\n# starter-questions-nrt-ws\n" in text  # what output_dir would be if it were not named
    assert str(finished.parent) not in text and "/questions.jsonl" not in text
    assert not re.search(r"\bseconds?\b|tokens_per", text)


def test_what_is_on_the_hub_is_linked(finished):
    names = {"model_name_or_path": "owner/model-1.5", "dataset_name": "owner/data,mine.jsonl"}
    card = ModelCard(model_card(summary(finished, **names), "</think>"))
    assert card.data.base_model == "owner/model-1.5"
    assert card.data.datasets == ["owner/data"]
    assert "[owner/model-1.5](https://huggingface.co/owner/model-1.5), trained for" in card.text
    assert "on [owner/data](https://huggingface.co/datasets/owner/data), `mine.jsonl`." in card.text


def test_an_adapter_is_one_of_peft_and_sft_rewards_nothing(finished):
    lora = ModelCard(
        model_card(summary(finished, use_peft=True, lora_r=4, objective="sft", max_trace_length=None), "~")
    )
    assert lora.data.library_name == "peft"
    assert "with a LoRA adapter" in lora.text and "| lora_r | 4 |" in lora.text
    assert "reward by" not in lora.text and "max_trace_length" not in lora.text


def test_nothing_held_out_means_no_figures(finished):
    assert "held-out" not in model_card(summary(finished) | {"before": {}, "after": {}}, "</think>")


# The upload


def test_nothing_is_uploaded_unless_asked(tiny_run, tmp_path, hub):
    train(tiny_run(tmp_path / "run", max_steps=1))
    assert hub.calls == []


def test_final_is_uploaded_when_it_is_written_and_again_when_asked_again(tiny_run, tmp_path, hub, capsys):
    train(tiny_run(tmp_path / "run", max_steps=1, push_to_hub=True))
    final = sorted(path.name for path in (tmp_path / "run/final").iterdir())
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(final)
    create = ("create_repo", "run", {"private": None, "exist_ok": True})
    assert hub.calls == [("whoami",), create, ("upload_folder", "me/run", final)]
    assert capsys.readouterr().out.endswith("uploaded to https://huggingface.co/me/run\n")
    hub.calls.clear()
    fields = {"push_to_hub": True, "hub_model_id": "team/model", "hub_private_repo": True}
    train(tiny_run(tmp_path / "run", max_steps=1, **fields))
    create = ("create_repo", "team/model", {"private": True, "exist_ok": True})
    assert hub.calls == [("whoami",), create, ("upload_folder", "team/model", final)]


def test_nobody_is_told_before_the_first_step(tiny_run, tmp_path, hub):
    hub.whoami = refuse
    with pytest.raises(UserError, match=r"push_to_hub needs an account .* hf auth login.* \(Token is required\)"):
        train(tiny_run(tmp_path / "run", max_steps=1, push_to_hub=True))
    assert not (tmp_path / "run").exists()


def test_a_refused_upload_leaves_a_finished_run(tiny_run, tmp_path, hub):
    hub.upload_folder = refuse
    with pytest.raises(UserError, match=r"could not be uploaded to run; hf upload run .*/final tries again"):
        train(tiny_run(tmp_path / "run", max_steps=1, push_to_hub=True))
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 1


def test_export_takes_the_card_along_and_uploads(finished, tmp_path, hub, capsys):
    options = ["--model_name_or_path", str(finished / "final"), "--output_dir", str(tmp_path / "alone")]
    assert cli.main(["export", *options, "--push_to_hub", "true", "--hub_model_id", "me/alone"]) == 0
    assert (tmp_path / "alone/README.md").read_bytes() == (finished / "final/README.md").read_bytes()
    assert [call[:2] for call in hub.calls[1:]] == [("create_repo", "me/alone"), ("upload_folder", "me/alone")]
    assert "uploaded to https://huggingface.co/me/alone" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hub_model_id", "hub_private_repo"])
def test_a_repository_without_an_upload_cannot_take_effect(name, capsys):
    for command in (["train"], ["export", "--model_name_or_path", "a", "--output_dir", "b"]):
        assert cli.main([*command, f"--{name}", "true"]) == 2
        assert f"{name} cannot take effect: push_to_hub is false" in capsys.readouterr().err


def test_the_hub_is_no_part_of_what_a_run_is():
    from nrt_fast.run import FREE_FIELDS

    assert {"push_to_hub", "hub_model_id", "hub_private_repo"} <= FREE_FIELDS & set(vars(TrainConfig()))
