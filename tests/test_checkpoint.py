"""Checkpoints are there whole or not at all, wherever a process dies and whatever the disk says."""

import errno
import itertools
import os
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nrt_fast import Model, UserError, checkpoint, loop
from nrt_fast.metrics import MetricsFile, read_metrics, replace_file

IDENTITY = {"seed": 0, "model": "tiny"}


def save(folder, step, keep=2, size=3):
    return checkpoint.save(
        folder, step, lambda path: (path / "config.json").write_text("{}"), {"ema": {"flat": torch.ones(2)}},
        {"first": torch.full((size,), float(step))}, {"step": step}, keep,
    )  # fmt: skip


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def dies_at(operation, work):
    """Do the work in a fork that dies before its n-th operation on files; False if it has fewer."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def hook(event, args):
            if event.partition(".")[0] in ("os", "open", "shutil") and next(count) == operation:
                os._exit(9)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_what_is_saved_is_loaded(tmp_path):
    folder = save(tmp_path, 7)
    state, tensors = checkpoint.load(folder)
    assert state == {"step": 7}
    assert torch.equal(tensors["ema"]["flat"], torch.ones(2))
    own = checkpoint.load_slices(folder, {"first": slice(1, 3), "absent": slice(0, 1)})
    assert torch.equal(own.pop("first"), torch.full((2,), 7.0)) and not own
    assert checkpoint.newest(tmp_path) == folder


def test_the_newest_are_kept(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_a_damaged_checkpoint_is_not_kept_for_a_good_one(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoint-5/optimizer.safetensors").unlink()
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["checkpoint-4"]


def test_dying_at_any_file_operation_leaves_complete_checkpoints(tmp_path):
    """Two are there, a third is saved and the first dropped: all that are there are complete, the second among them."""
    for operation in itertools.count():
        folder = tmp_path / str(operation)
        folder.mkdir()
        save(folder, 1), save(folder, 2)
        died = dies_at(operation, lambda folder=folder: save(folder, 3))
        found = list(folder.glob("checkpoint-*"))
        assert [checkpoint.problem(path) for path in found] == [None] * len(found)
        assert folder / "checkpoint-2" in found
        if not died:
            break
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]
    assert operation > 20


def test_dying_at_any_file_operation_leaves_a_whole_final_model(tmp_path):
    def write(text):
        with checkpoint.atomic_folder(folder / "final") as final:
            for name in ("a", "b"):
                (final / name).write_text(text)

    for operation in itertools.count():
        folder = tmp_path / str(operation)
        write("old")
        died = dies_at(operation, lambda: write("new"))
        content = [(folder / "final" / name).read_text() for name in "ab"] if (folder / "final").exists() else None
        assert content in (["old", "old"], ["new", "new"], None)
        if not died:
            break
    assert content == ["new", "new"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    checkpoint.claim_folder(tmp_path, IDENTITY)
    (tmp_path / ".checkpoint-3.tmp").mkdir()
    (tmp_path / ".checkpoint-3.tmp/model.safetensors").touch()
    (tmp_path / ".summary.json.tmp").touch()
    with pytest.raises(UserError, match="belongs to another run: seed was 0 there and is 1 now"):
        checkpoint.claim_folder(tmp_path, IDENTITY | {"seed": 1})
    assert len(names(tmp_path)) == 3, "another run's folder is not touched"
    checkpoint.claim_folder(tmp_path, IDENTITY)
    assert names(tmp_path) == ["run.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="checkpoint-2: the disk is full; what was saved before is complete"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    assert checkpoint.problem(tmp_path / "checkpoint-1") is None


def test_a_refused_write_inside_safetensors_is_told(tmp_path, file_size_limit):
    """safetensors wraps the operating system's errors in its own."""
    save(tmp_path, 1)
    expected = "checkpoint-2: File too large; what was saved before is complete"
    with file_size_limit(100_000), pytest.raises(UserError, match=expected):
        save(tmp_path, 2, size=1_000_000)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    replace_file(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        replace_file(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", ["summary.json"])


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    metrics = MetricsFile(path, last_step=1)
    metrics.write({"step": 2, "loss": 0.5})
    metrics.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("tail", ["\0\0\0\0\n", '{"step": 3, "lo\n', "{}\n\0\n\xff\x0c\0\0", "[3]\n"])
def test_a_broken_end_of_metrics_is_told_and_dropped(tail, tmp_path, caplog):
    """What a power loss leaves: zeros, half a line with more behind it, bytes of another file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail.encode("latin1"))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    metrics = MetricsFile(path, last_step=2)
    assert (metrics.rows, metrics.last_seen) == ([{"step": 1}, {"step": 2}], 2)
    metrics.write({"step": 3})
    metrics.sync()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    (record,) = caplog.records
    assert record.getMessage() == f"{path} is broken from line 3 on, which is dropped"


def test_a_broken_line_within_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\0\0\n{"step": 3}\n')
    for read in (read_metrics, lambda path: MetricsFile(path, last_step=1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is broken, and later lines are not"):
            read(path)
    assert path.read_text().count("\n") == 3, "it is as it was"


def test_metrics_are_on_the_disk_before_their_checkpoint(tiny_run, tmp_path, monkeypatch):
    order, save, sync = [], loop._save, MetricsFile.sync
    monkeypatch.setattr(loop, "_save", lambda run, progress: (order.append(progress.step), save(run, progress)))
    monkeypatch.setattr(MetricsFile, "sync", lambda metrics: (order.append("metrics"), sync(metrics)))
    loop.train(tiny_run(tmp_path / "run", max_steps=3, save_steps=2))
    assert order == ["metrics", 2, "metrics", 3]


@pytest.fixture(scope="module")
def plain_model(make_module, tmp_path_factory):
    """A model whose tokenizer reserves nothing, so that a delimiter has to be added."""
    folder = tmp_path_factory.mktemp("plain")
    vocabulary = ["<unk>", "<eos>", *"? . yes no".split(), *(f"w{index}" for index in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder)
    make_module("llama", vocab_size=len(vocabulary), eos_token_id=1, bos_token_id=None).save_pretrained(folder)
    return folder


def test_a_grown_vocabulary_is_saved_with_its_delimiter(plain_model, tiny_run, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(f'{{"question": "w{i} w{i + 1} ?", "answer": "yes ."}}\n' for i in range(9)))
    loop.train(tiny_run(tmp_path / "run", model_name_or_path=str(plain_model), dataset_name=str(data)))
    final = tmp_path / "run/final"
    tokenizer, module = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer("w3 </think> yes", add_special_tokens=False).input_ids == [9, 67, 4]
    assert module.config.vocab_size == 68
    with torch.no_grad():
        reference = module(torch.tensor([[9, 67, 4]])).logits[0]
    torch.testing.assert_close(Model.from_pretrained(final).logits([9, 67, 4]), reference, rtol=0, atol=3e-5)


def test_a_grown_run_resumes(plain_model, tiny_run, tmp_path, measured):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(f'{{"question": "w{i} w{i + 1} ?", "answer": "yes ."}}\n' for i in range(9)))
    fields = {"model_name_or_path": str(plain_model), "dataset_name": str(data)}
    for folder, stops in (("whole", [3]), ("stopped", [1, 3])):
        for steps in stops:
            loop.train(tiny_run(tmp_path / folder, max_steps=steps, **fields))
    assert measured(tmp_path / "stopped") == measured(tmp_path / "whole")
