"""Bad input of the data layer: each gives one line that says what is wrong, where, and what would be valid."""

import gzip
import json
import math
import shutil

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nrt_fast import data
from nrt_fast.config import TrainConfig
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import UserError

GOOD = b'{"question": "one two", "answer": "three"}\n'


def word_tokenizer(chat_template=None, eos_token="<eos>"):
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", "one", "two", "three"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace("~", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos_token, unk_token="<unk>", chat_template=chat_template
    )


def error_of(path, limits=None, num_heldout=0, tokenizer=None, **fields):
    """The one line that loading the file ends with."""
    config = TrainConfig(dataset_name=str(path), num_eval_prompts=num_heldout, **fields)
    with pytest.raises(UserError) as raised:
        data.load_data(config, tokenizer or word_tokenizer(), limits or data.Limits(50, 50), 0)
    message = str(raised.value)
    assert "\n" not in message
    return message


def row(**fields):
    return json.dumps(fields).encode() + b"\n"


BAD_ROWS = {
    "invalid UTF-8": (b'{"question": "one", "answer": "t\xff"}\n', "row 2: invalid UTF-8 (byte 0xff at offset 32)"),
    "cut UTF-8": (b'{"question": "one", "answer": "\xe4\xba', "row 2: invalid UTF-8"),
    "invalid JSON": (b'{"question": "one", "answer": }\n', "row 2: invalid JSON (Expecting value: line 1 column 31"),
    "cut JSON": (b'{"question": "one", "ans', "row 2: invalid JSON"),
    "deep JSON": (b"[" * 100_000, "row 2: invalid JSON"),
    "a list": (b'["one", "two"]\n', "row 2: a JSON object with named fields is expected, not a list"),
    "null": (b"null\n", "row 2: a JSON object with named fields is expected, not null"),
    "no answer": (row(question="one"), "row 2: field 'answer' is missing"),
    "null answer": (row(question="one", answer=None), "row 2: field 'answer' is missing"),
    "empty answer": (row(question="one", answer=""), "row 2: field 'answer' is empty"),
    "blank answer": (row(question="one", answer=" \n"), "row 2: field 'answer' is empty"),
    "no question": (row(answer="one"), "row 2: field 'question' is missing"),
    "empty question": (row(question=" ", answer="one"), "row 2: field 'question' is empty"),
    "answer list": (row(question="one", answer=["two"]), "row 2: field 'answer' holds list, text is expected"),
    "answer truth": (row(question="one", answer=True), "row 2: field 'answer' holds bool, text is expected"),
    "no tokens": (row(question="one", answer="~~"), "row 2: the answer '~~' is empty after tokenisation"),
    "EOS alone": (row(question="one", answer="<eos>"), "row 2: the answer '<eos>' is empty after tokenisation"),
    "NaN answer": (row(question="one", answer=math.nan), "row 2: field 'answer' is missing"),
    "infinite question": (row(question=-math.inf, answer="one"), "row 2: field 'question' is missing"),
    "NaN alias": (row(question="one", answer="two", aliases=[math.nan]), "row 2: field 'aliases[0]' is missing"),
    "half a pair": (b'{"question": "one", "answer": "\\ud800"}\n', "row 2: field 'answer' is not valid Unicode"),
    "bad spans": (
        row(question="one", answer="two", hard_spans=[3]),
        "row 2: hard_spans should be a list of [start, end]",
    ),
    "bad aliases": (
        row(question="one", answer="two", aliases="2"),
        "row 2: field 'aliases' holds str, a list of texts is expected",
    ),
    "empty alias": (row(question="one", answer="two", aliases=["2", " "]), "row 2: field 'aliases[1]' is empty"),
    "far spans": (row(question="one", answer="two", hard_spans=[[0, 4]]), "row 2: hard_spans go beyond the answer's 3"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, name):
    content, message = BAD_ROWS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + content)
    assert error_of(path).startswith(f"{path}, {message}")


BAD_TURNS = {
    "no assistant": ([{"role": "user", "content": "one"}], "no answer (no assistant turn in field 'messages')"),
    "empty answer": (
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": ""}],
        "no answer (field 'messages' is empty)",
    ),
    "no user": ([{"role": "assistant", "content": "one"}], "no question (no user turn before the answer)"),
    "NaN": (
        [{"role": "user", "content": math.nan}, {"role": "assistant", "content": "two"}],
        "field 'messages[0].content' is missing",
    ),
    "not a message": (["one", {"role": "assistant", "content": "two"}], "messages[0] is not a message with a role"),
    "content list": (
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "two"}],
        "field 'messages[0].content' holds list, text is expected",
    ),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_bad_messages_are_named(tmp_path, name):
    turns, message = BAD_TURNS[name]
    path = tmp_path / "a.jsonl"
    good = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path.write_bytes(row(messages=good) + row(messages=turns))
    assert error_of(path).startswith(f"{path}, row 2: {message}")


BAD_FILES = {
    "empty.jsonl": (b"", "no rows"),
    "blank.jsonl": (b"\n\n", "no rows"),
    "object.json": (b'{"rows": []}', 'a list of objects, or {"data": [...]}, is expected'),
    "broken.json": (b'[{"question": "one",\n', "invalid JSON (Expecting property name"),
    "utf16.json": ("[]".encode("utf-16"), "row 1: invalid UTF-8"),
    "header.csv": (b"question,answer\n", "no rows"),
    "cells.csv": (
        b"question,answer\none,two\none,two,three\n",
        "row 3: 3 cells, but the header names 2 (question, answer)",
    ),
    "quote.csv": (b'question,answer\none,"two\n', "invalid CSV"),
    "twice.csv": (b"question,answer,answer\none,two,three\n", "2 columns are named 'answer'; each needs its own name"),
    "utf8.csv": (b"question,answer\none,t\xff\n", "row 2: invalid UTF-8"),
    "a.parquet": (b"PAR1 not at all", "invalid Parquet"),
    "plain.jsonl.gz": (GOOD, "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 1000)[:-20], "cannot be read"),
    "a.txt": (GOOD, "unknown kind of file; one of .jsonl .json .csv .parquet, also .gz, is expected"),
    "fields.jsonl": (row(text="one", title="two"), "row 1: question and answer not found; name prompt_field"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    error = error_of(path)
    assert error.startswith(str(path))
    assert message in error


def test_missing_file_shows_close_names(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    assert error_of(tmp_path / "trian.jsonl").endswith(f"no such file in {tmp_path}; did you mean train.jsonl?")
    assert error_of(tmp_path / "none" / "a.jsonl").endswith(f"its folder {tmp_path / 'none'} does not exist either")


def test_missing_file_is_told_before_any_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"not read")
    assert "no such file" in error_of(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}")


def test_unknown_hub_id(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "neither a file here nor a data set that datasets can load (no network here)"
    assert error_of("owner/name") == f"owner/name: {message}"


def test_folder_without_data(tmp_path):
    pytest.importorskip("datasets")
    assert error_of(tmp_path).startswith(f"{tmp_path}: neither a file here nor a data set")


def test_folder_of_files_that_differ(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(row(question="one", answer="two", extra="three"))
    assert error_of(tmp_path) == (
        f"{tmp_path}: datasets cannot read it (its columns differ: there are 1 new columns ({{'extra'}}))"
    )


def test_folder_with_a_broken_file(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"question": "one", "ans')
    assert error_of(tmp_path).startswith(f"{tmp_path}: datasets cannot read it (JSON parse error: ")


def test_unknown_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "d")
    assert "train" in error_of(tmp_path / "d")


def test_splits_of_what_has_none(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    datasets.Dataset.from_list([{"question": "one", "answer": "two"}]).save_to_disk(tmp_path / "d")
    message = f"dataset_train_split test cannot take effect: no splits in {path}, {tmp_path / 'd'}"
    assert error_of(f"{path},{tmp_path / 'd'}", dataset_train_split="test") == message
    assert (
        error_of(path, num_heldout=1, eval_dataset_name=str(tmp_path / "d"), dataset_eval_split="train")
        == f"dataset_eval_split train cannot take effect: no splits in {tmp_path / 'd'}"
    )
    with pytest.raises(UserError, match="dataset_train_split test cannot take effect: no splits in the built-in tasks"):
        data.load_data(TrainConfig(dataset_train_split="test"), word_tokenizer(), data.Limits(50, 50), 1)


def test_what_is_trained_on_is_not_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/train.jsonl", "a/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    rest = "or no eval_dataset_name: then rows are held out of the training data"
    assert error_of("a/train.jsonl", num_heldout=1, eval_dataset_name=f"{tmp_path}/a/train.jsonl") == (
        f"eval_dataset_name {tmp_path}/a/train.jsonl is what is trained on; valid: other data, {rest}"
    )
    for split in (None, "train"):
        assert error_of("a", num_heldout=1, eval_dataset_name="./a", dataset_eval_split=split) == (
            f"eval_dataset_name ./a is what is trained on; valid: dataset_eval_split with another split of it, {rest}"
        )


@pytest.mark.parametrize("field", ["prompt_field", "answer_field"])
def test_named_field_that_is_not_there(tmp_path, field):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    message = "row 1: reply.text not found; name prompt_field and answer_field among: question, answer"
    assert error_of(path, **{field: "reply.text"}) == f"{path}, {message}"


def test_overlong_is_an_error_where_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + row(question="one " * 9, answer="two " * 9))
    prompts = data.Limits(8, 50, overlong_prompts="error")
    answers = data.Limits(50, 8, overlong_answers="error")
    assert error_of(path, prompts) == f"{path}, row 2: the prompt has 12 tokens, max_prompt_length is 8"
    assert error_of(path, answers) == f"{path}, row 2: the answer has 10 tokens, max_answer_length is 8"


def test_nothing_left_names_the_limit_and_the_shortest(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3)
    assert error_of(path, data.Limits(3, 50)) == (
        f"{path}: all 3 rows are over the limits (the shortest prompt has 5 tokens, max_prompt_length is 3; "
        "the shortest answer has 2 tokens, max_answer_length is 50)"
    )


def test_nothing_left_to_train_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3)
    assert error_of(path, num_heldout=3) == (
        "num_eval_prompts: 3 rows are to be held out, but there are only 3 to train on; valid: at most 2, or an "
        "eval_dataset_name"
    )


def test_chat_template_that_refuses(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    refusing = word_tokenizer("{{ raise_exception('system turns only') }}")
    assert error_of(path, tokenizer=refusing).endswith("chat template refuses the prompt (system turns only)")
    broken = word_tokenizer("{{ messages[0]['content'] + 1 }}")
    assert error_of(path, tokenizer=broken).startswith(
        f"{path}, row 1: the tokenizer's chat template refuses the prompt (can only concatenate str"
    )
    assert error_of(path, tokenizer=word_tokenizer("{{ '' }}")).endswith(
        "row 1: the chat template makes an empty prompt"
    )
    assert "no chat template" in error_of(path, chat_template_kwargs={"enable_thinking": True})


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "continue_final_message"])
def test_template_options_that_are_decided_here(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    kwargs = {"enable_thinking": True, name: True}
    assert error_of(tmp_path / "a.jsonl", tokenizer=word_tokenizer("{{ 'one' }}"), chat_template_kwargs=kwargs) == (
        f"chat_template_kwargs: {name} is decided here; valid: options of the template's own"
    )


def test_weights_that_do_not_fit():
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match="dataset_weights"):
            data.Order([2, 3], weights)
    with pytest.raises(UserError, match="no rows left"):
        data.Order([2, 0], [1.0, 1.0])


def test_delimiter_of_several_tokens():
    with pytest.raises(UserError) as raised:
        data.choose_delimiter(word_tokenizer(), "one two")
    assert str(raised.value).startswith("delimiter 'one two' is 2 tokens ('one' 'two'); one token is needed")


@pytest.mark.parametrize("delimiter", ["<eos>", "<bos>", "unheard"])
def test_delimiter_with_another_use(delimiter):
    with pytest.raises(UserError, match="which has another use"):
        data.choose_delimiter(word_tokenizer(), delimiter)


def test_end_of_thinking_with_another_use():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "</think>"})
    with pytest.raises(UserError, match=r"</think> has another use.*valid: --delimiter with a token"):
        data.choose_delimiter(tokenizer)


def test_vocabulary_mismatch():
    with pytest.raises(
        UserError, match=r"vocabulary mismatch: the tokenizer's highest id is 5 .* the model has 5 rows"
    ):
        data.check_vocabulary(word_tokenizer(), 5)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in this folder; a tokenizer\.json is looked for"):
        data.load_tokenizer(str(tmp_path))


def test_damaged_tokenizer(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        data.load_tokenizer(str(tmp_path / "model"))


def test_tokenizer_without_eos(tmp_path):
    word_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no eos_token"):
        data.load_tokenizer(str(tmp_path))
