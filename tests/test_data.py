"""Data: files to rows, rows to pairs, pairs to token ids, and the order they come in."""

import csv
import gzip
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nrt_fast import data
from nrt_fast.config import TrainConfig
from nrt_fast.data.load import NUM_BUILTIN_ROWS
from nrt_fast.data.order import permutation
from nrt_fast.data.render import plain_prompt
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import Example, UserError

WIDE = data.Limits(max_prompt_length=100, max_answer_length=100)
QA = [{"question": "one two", "answer": "three"}, {"question": 'zwei, "drei"\nvier', "answer": "fünf 五"}]
CHAT = "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} {% endfor %}{{ mode or 'think' }}"


def word_tokenizer(*special, chat_template=None):
    words = "Question: Answer: Reasoning: user system one two three four five six think hush".split()
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", *special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(special), chat_template=chat_template,
    )  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered_rows(num_rows, answer="three"):
    return [{"question": f"one {'two ' * (index % 5)}", "answer": answer} for index in range(num_rows)]


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


# Reading


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "data.json": lambda path, rows: path.write_text(json.dumps({"data": rows}), encoding="utf-8"),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, name, compressed):
    path = tmp_path / name
    WRITERS[name](path, QA)
    if compressed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert [row.fields for row in data.read_rows(str(path))] == QA


def test_rows_are_numbered_by_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    (tmp_path / "a.csv").write_text('a,b\n"x\ny",1\nz,2\n', encoding="utf-8")
    assert [row.where.rpartition(", ")[2] for row in data.read_rows(str(tmp_path / "a.jsonl"))] == ["row 1", "row 4"]
    assert [row.where.rpartition(", ")[2] for row in data.read_rows(str(tmp_path / "a.csv"))] == ["row 2", "row 4"]


def test_long_and_unnamed_csv_cells(tmp_path):
    (tmp_path / "a.csv").write_text(f"question,,answer,\none,1,{'x ' * 100_000},2\n")
    (row,) = data.read_rows(str(tmp_path / "a.csv"))
    assert (row.fields["question"], len(row.fields["answer"])) == ("one", 200_000)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", QA)
    assert len(list(data.read_rows("~/a.jsonl"))) == 2


def test_folders_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(QA)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "splits")
    assert [row.fields for row in data.read_rows(str(tmp_path / "one"))] == QA
    assert [row.fields for row in data.read_rows(str(tmp_path / "splits"), "test")] == QA[1:]


def test_hub_ids_go_to_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return datasets.Dataset.from_list(QA)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.where for row in data.read_rows("owner/name:main", "validation")][1] == "owner/name:main, row 2"
    assert [row.fields for row in data.read_rows("owner/name")] == QA
    assert asked == [("owner/name", "main", "validation"), ("owner/name", None, "train")]


# Schemas

USER = [{"role": "user", "content": "one"}]
SPOKEN = [*USER, {"role": "assistant", "content": "two"}]
SCHEMAS = {
    "messages": ({"messages": SPOKEN}, USER, "two"),
    "several turns": (
        {"messages": [*SPOKEN, *USER, {"role": "assistant", "content": "four"}]},
        [*SPOKEN, *USER],
        "four",
    ),
    "open last turn": ({"messages": [*SPOKEN, *USER]}, USER, "two"),
    "messages and solution": ({"messages": USER, "solution": "two"}, USER, "two"),
    "prompt and completion": ({"prompt": "one", "completion": "two"}, USER, "two"),
    "conversational": ({"prompt": USER, "completion": SPOKEN[1:]}, USER, "two"),
    "prompt and label": ({"prompt": "one", "label": 2}, USER, "2"),
    "verl": ({"prompt": USER, "reward_model": {"style": "rule", "ground_truth": "two"}}, USER, "two"),
    "question and answer": ({"id": 7, "question": "one", "answer": "two", "solution": "x"}, USER, "two"),
    "alpaca": ({"instruction": "one", "input": "", "output": "two"}, USER, "two"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}, USER, "two"),
    "completion before answer": ({"prompt": "one", "answer": "x", "completion": "two"}, USER, "two"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_detected(name):
    fields, messages, answer = SCHEMAS[name]
    pair = data.detect_schema([data.Row(fields, "f, row 1")]).pair(data.Row(fields, "f, row 1"))
    assert (pair.messages, pair.answer, pair.where) == (messages, answer, "f, row 1")


def test_input_follows_the_instruction():
    row = data.Row({"instruction": "one", "input": "two", "output": "three"}, "f, row 1")
    schema = data.detect_schema([row])
    assert schema.pair(row).question == "one\n\ntwo"
    assert str(schema) == "instruction (+ input) + output"


def test_gaps_of_number_columns_are_missing(tmp_path):
    """pandas fills them with NaN."""
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"instruction": "one", "input": math.nan, "output": 2.5, "aliases": math.nan}])
    (row,) = data.read_rows(str(path))
    pair = data.detect_schema([row]).pair(row)
    assert (pair.question, pair.answer, pair.aliases) == ("one", "2.5", ())
    assert not data.Schema("instruction", "input").matches(row)


@pytest.mark.parametrize(
    ("fields", "names", "question", "answer"),
    [
        ({"question": "one", "answer": "x", "solution": "two"}, (None, "solution"), "one", "two"),
        ({"q": {"text": "one"}, "answer": "two"}, ("q.text", None), "one", "two"),
        ({"q.text": "one", "a": {"b": {"c": "two"}}}, ("q.text", "a.b.c"), "one", "two"),
        ({"messages": SPOKEN, "solution": "three"}, (None, "solution"), "one", "three"),
    ],
)
def test_named_fields_win(fields, names, question, answer):
    row = data.Row(fields, "f, row 1")
    pair = data.detect_schema([row], *names).pair(row)
    assert (pair.question, pair.answer) == (question, answer)


# The tokenizer and its delimiter


@pytest.mark.parametrize(
    ("special", "text"),
    [
        (["</think>"], "</think>"),
        (["<|reserved_special_token_1|>", "<|reserved_special_token_0|>", "</think>"], "</think>"),
        (["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], "<|reserved_special_token_0|>"),
        (["[INST]", "[control_8]"], "[control_8]"),
        (["<pad>", "<unused0>"], "<unused0>"),
    ],
)
def test_a_token_there_is_becomes_the_delimiter(special, text):
    tokenizer = word_tokenizer(*special)
    size = len(tokenizer)
    assert data.choose_delimiter(tokenizer) == data.Delimiter(tokenizer.convert_tokens_to_ids(text), text, added=False)
    assert len(tokenizer) == size


@pytest.mark.parametrize("use", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_a_reserved_token_with_a_use_is_left_alone(use):
    first, second = "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"
    for special, text in (([first, second], second), ([first], "</think>")):
        tokenizer = word_tokenizer(*special)
        setattr(tokenizer, use, first)
        assert data.choose_delimiter(tokenizer).text == text


def test_else_a_delimiter_is_added_once():
    tokenizer = word_tokenizer()
    size = len(tokenizer)
    assert data.choose_delimiter(tokenizer) == data.Delimiter(size, "</think>", added=True)
    assert data.choose_delimiter(tokenizer) == data.Delimiter(size, "</think>", added=False)
    assert tokenizer("one </think> two", add_special_tokens=False)["input_ids"][1] == size


def test_named_delimiter():
    tokenizer = word_tokenizer("</think>")
    assert data.choose_delimiter(tokenizer, "hush").id == tokenizer.convert_tokens_to_ids("hush")


def test_vocabulary_that_just_fits():
    tokenizer = word_tokenizer()
    data.check_vocabulary(tokenizer, len(tokenizer))


# Rendering


def render_one(tokenizer, fields, **kwargs):
    row = data.Row(fields, "f, row 1")
    return data.render([data.detect_schema([row]).pair(row)], tokenizer, **kwargs)[0]


def test_plain_template_and_closed_answer():
    tokenizer = word_tokenizer()
    example = render_one(tokenizer, {"question": "one two", "answer": "three"}, first_uid=5)
    assert words(tokenizer, example.prompt_ids) == "<bos> Question: one two Reasoning:"
    assert words(tokenizer, example.answer_ids) == "three <eos>"
    assert (example.uid, example.question, example.answer, example.hard_positions) == (5, "one two", "three", None)


def test_plain_template_of_several_turns():
    turns = [{"role": "system", "content": "six"}, *SPOKEN, {"role": "user", "content": "{three}"}]
    assert plain_prompt(turns) == "six\n\nQuestion: one\n\nAnswer: two\n\nQuestion: {three}\n\nReasoning:"


def test_chat_template_is_the_tokenizers_own():
    tokenizer = word_tokenizer(chat_template=CHAT)
    example = render_one(tokenizer, {"question": "one two", "answer": "three"})
    direct = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one two"}], add_generation_prompt=True, tokenize=True
    )
    assert example.prompt_ids == list(getattr(direct, "data", {"input_ids": direct})["input_ids"])
    assert words(tokenizer, example.prompt_ids) == "<bos> user one two think"


def test_chat_template_kwargs_reach_the_template():
    tokenizer = word_tokenizer(chat_template=CHAT)
    example = render_one(tokenizer, QA[0], chat_template_kwargs={"mode": "hush"})
    assert words(tokenizer, example.prompt_ids).endswith("two hush")


def test_bos_is_never_doubled():
    tokenizer = word_tokenizer()
    turns = [{"role": "system", "content": "<bos> six"}, *SPOKEN]
    example = render_one(tokenizer, {"messages": turns})
    assert example.prompt_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("answer", ["three four", "three four <eos>", "three <eos> four", "<eos> three four <eos>"])
def test_an_answer_ends_once(answer):
    tokenizer = word_tokenizer()
    fields = {"question": "one", "answer": answer, "hard_spans": [[answer.index("four"), answer.index("four") + 4]]}
    example = render_one(tokenizer, fields)
    assert words(tokenizer, example.answer_ids) == "three four <eos>"
    assert example.hard_positions == (1,)


def test_hard_spans_mark_the_tokens_they_touch():
    fields = {"question": "one", "answer": "one  two three four", "hard_spans": [[0, 1], [7, 11]]}
    assert render_one(word_tokenizer(), fields).hard_positions == (0, 1, 2)


def test_rows_of_a_batch_do_not_touch_one_another():
    tokenizer = word_tokenizer()
    rows = [data.Row(fields, "f") for fields in (*numbered_rows(4), {**QA[0], "hard_spans": [[0, 5]]})]
    schema = data.detect_schema(rows)
    together = data.render([schema.pair(row) for row in rows], tokenizer)
    alone = [data.render([schema.pair(row)], tokenizer, uid)[0] for uid, row in enumerate(rows)]
    assert together == alone


# Loading


def test_limits_drop_and_count(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*numbered_rows(5), {"question": "one", "answer": "two " * 9}])
    loaded = data.load_data(TrainConfig(dataset_name=path), word_tokenizer(), data.Limits(6, 5), 0)
    assert [example.uid for example in loaded.train] == [0, 1, 2]
    assert loaded.lines == [
        f"{path}: 6 rows, question + answer",
        "dropped 2 of 6 rows: prompt over 6 tokens",
        "dropped 1 of 6 rows: answer over 5 tokens",
    ]


def test_truncate_left_keeps_bos_and_the_end(tmp_path):
    tokenizer = word_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "one two three four", "answer": "five"}])
    limits = data.Limits(4, 5, overlong_prompts="truncate_left")
    loaded = data.load_data(TrainConfig(dataset_name=path), tokenizer, limits, 0)
    assert words(tokenizer, loaded.train[0].prompt_ids) == "<bos> three four Reasoning:"
    assert loaded.lines[1] == "cut the start of 1 of 1 rows: prompt over 4 tokens"


def test_examples_survive_compact_storage():
    examples = data.render([data.Pair(USER, "two", [(0, 3)], "f, row 1", ("2", "three"))], word_tokenizer(), 3)
    assert list(data.Examples(examples)) == examples
    assert list(data.Examples.join([data.Examples(examples)] * 2).select([1])) == examples


def test_aliases_travel_to_the_examples(tmp_path):
    rows = [
        {"question": "one", "answer": "two", "aliases": ["2", "three four", 5]},
        {"question": "one", "answer": "two", "aliases": []},
        {"question": "one", "answer": "two"},
    ]
    loaded = data.load_data(
        TrainConfig(dataset_name=write_jsonl(tmp_path / "a.jsonl", rows)), word_tokenizer(), data.Limits(6, 5), 0
    )
    assert [example.aliases for example in loaded.train] == [("2", "three four", "5"), (), ()]


def test_aliases_of_real_data(shared_data):
    rows = list(data.read_rows(str(shared_data / "train/webquestions_trainmodel.jsonl.gz")))
    schema = data.detect_schema(rows)
    aliases = [schema.pair(row).aliases for row in rows]
    assert max(map(len, aliases)) > 1 and min(map(len, aliases)) == 1


def test_several_data_sets(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", numbered_rows(30))
    second = write_jsonl(tmp_path / "b.jsonl", numbered_rows(20, "four"))
    config = TrainConfig(dataset_name=f"{first}, {second}", seed=1, num_eval_prompts=10)
    loaded = data.load_data(config, word_tokenizer(), WIDE, 0)
    uids = [example.uid for example in loaded.train]
    heldout = [example.uid for example in loaded.heldout]
    assert sorted(uids + heldout) == list(range(50))
    assert uids == sorted(uids)
    assert loaded.num_per_dataset == [sum(uid < 30 for uid in uids), sum(uid >= 30 for uid in uids)]
    again = data.load_data(config, word_tokenizer(), WIDE, 0)
    assert [example.uid for example in again.heldout] == heldout
    assert again.digests == loaded.digests
    assert [name for name, _ in loaded.digests] == [first, second]
    other = data.load_data(replace(config, seed=2), word_tokenizer(), WIDE, 0)
    assert [example.uid for example in other.heldout] != heldout
    assert other.digests != loaded.digests


@pytest.mark.parametrize(("num_rows", "wanted", "num_heldout"), [(2, 64, 1), (20, 64, 2), (639, 64, 63), (650, 64, 64)])
def test_few_rows_have_a_tenth_held_out(tmp_path, num_rows, wanted, num_heldout):
    path = write_jsonl(tmp_path / "a.jsonl", numbered_rows(num_rows))
    loaded = data.load_data(TrainConfig(dataset_name=path), word_tokenizer(), WIDE, wanted)
    assert (len(loaded.heldout), len(loaded.train)) == (num_heldout, num_rows - num_heldout)
    _, same = data.split_heldout(num_rows, num_heldout, seed=0)
    assert [example.uid for example in loaded.heldout] == same


def test_held_out_data_has_a_split_of_its_own(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, answer in (("train", "three"), ("test", "four")):
        write_jsonl(folder / f"{name}.jsonl", numbered_rows(4, answer))
    other = write_jsonl(tmp_path / "b.jsonl", numbered_rows(4, "five"))
    for trained, split, answer in ((str(folder), "test", "four"), (other, "test", "four"), (other, None, "three")):
        config = TrainConfig(
            dataset_name=trained, eval_dataset_name=str(folder), dataset_eval_split=split, num_eval_prompts=3
        )
        loaded = data.load_data(config, word_tokenizer(), WIDE, 0)
        assert {example.answer for example in loaded.heldout} == {answer}
        assert len(loaded.train) == 4


def test_what_is_trained_on_and_held_out_is_counted(tmp_path):
    rows = [{"question": f"{number} one", "answer": "two"} for number in ("two", "three", "four", "five")]
    train, heldout = write_jsonl(tmp_path / "a.jsonl", rows[:3]), write_jsonl(tmp_path / "b.jsonl", rows[1:])
    config = TrainConfig(dataset_name=train, eval_dataset_name=heldout, num_eval_prompts=3)
    loaded = data.load_data(config, word_tokenizer(), WIDE, 0)
    assert loaded.lines[-1] == "2 of 3 held-out questions are trained on as well"
    apart = data.load_data(TrainConfig(dataset_name=train, num_eval_prompts=1), word_tokenizer(), WIDE, 0)
    assert apart.lines == [f"{train}: 3 rows, question + answer"]


def test_named_heldout_data_leaves_the_training_data_whole(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", numbered_rows(10))
    heldout = write_jsonl(tmp_path / "b.jsonl", numbered_rows(8, "four"))
    config = TrainConfig(dataset_name=train, eval_dataset_name=heldout)
    loaded = data.load_data(config, word_tokenizer(), WIDE, 5)
    assert (loaded.num_per_dataset, len(loaded.heldout)) == ([10], 5)
    assert {example.answer for example in loaded.heldout} == {"four"}


def test_built_in_tasks():
    tokenizer = data.load_tokenizer(str(MODEL_DIR))
    loaded = data.load_data(TrainConfig(), tokenizer, WIDE, 50)
    assert len(loaded.train) == sum(loaded.num_per_dataset) == NUM_BUILTIN_ROWS
    assert len(loaded.heldout) == 50
    assert not {example.question for example in loaded.heldout} & {example.question for example in loaded.train}
    for example in loaded.heldout:
        assert tokenizer.unk_token_id not in [*example.prompt_ids, *example.answer_ids]
        assert 1 <= len(example.hard_positions) < len(example.answer_ids) - 1


# Order


@pytest.mark.parametrize("sizes", [[7], [3, 4]])
def test_each_pass_has_every_row_once(sizes):
    order = data.Order(sizes, seed=3)
    passes = [order.take(7) for _ in range(20)]
    assert all(sorted(rows) == list(range(7)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 15
    assert (order.position, order.epoch) == (140, 20.0)


def test_order_depends_on_the_seed_alone():
    assert data.Order([50], seed=1).take(120) == data.Order([20, 30], seed=1).take(120)
    assert data.Order([50], seed=1).take(50) != data.Order([50], seed=2).take(50)


def steps(order, num_rows, num_steps):
    return [order.take(num_rows) for _ in range(num_steps)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.5, 0.1]])
@pytest.mark.parametrize("num_rows", [1, 7, 17, 18])
def test_order_resumes_anywhere(weights, num_rows):
    whole = steps(data.Order([5, 6, 7], weights, seed=9), num_rows, 40)
    for position in range(40):
        before = data.Order([5, 6, 7], weights, seed=9)
        steps(before, num_rows, position)
        after = data.Order([5, 6, 7], weights, seed=9)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert after.position == position * num_rows
        assert steps(after, num_rows, 40 - position) == whole[position:]


@pytest.mark.parametrize("num_rows", [3, 16, 19])
def test_no_step_has_a_row_twice(num_rows):
    """Where a pass ends in a step, rows of the next one that the step has already come in the step after it."""
    taken = steps(data.Order([20], seed=5), num_rows, 60)
    assert all(len(set(rows)) == num_rows for rows in taken)
    drawn = [row for rows in taken for row in rows]
    for start in range(0, len(drawn) - 20, 20):
        assert sorted(drawn[start : start + 20]) == list(range(20))
    plain = [row for epoch in range(60) for row in permutation(20, 5, 0, epoch).tolist()]
    plain = [plain[start : start + num_rows] for start in range(0, 60 * num_rows, num_rows)]
    first = next((index for index, rows in enumerate(plain) if len(set(rows)) < num_rows), len(plain))
    assert taken[:first] == plain[:first], "before the first such step nothing changes"


def test_a_data_set_that_is_smaller_than_its_share_of_a_step_comes_again():
    order = data.Order([2, 30], [1.0, 1.0], seed=1)
    for rows in steps(order, 10, 20):
        assert Counter(row for row in rows if row < 2) in ({0: 3, 1: 2}, {0: 2, 1: 3})
        assert len({row for row in rows if row >= 2}) == 5


def test_far_positions_are_reached_at_once():
    order = data.Order([1000], seed=0)
    order.load_state_dict({"sizes": [1000], "drawn": [10**15]})
    assert sorted(order.take(1000)) == list(range(1000))


def test_weights_are_kept_at_any_moment():
    order = data.Order([10, 1000, 100], [5.0, 3.0, 2.0], seed=4)
    rows = order.take(3000)
    for end in range(1, 3000, 37):
        drawn = Counter("first" if row < 10 else "second" if row < 1010 else "third" for row in rows[:end])
        for name, share in (("first", 0.5), ("second", 0.3), ("third", 0.2)):
            assert abs(drawn[name] - share * end) <= 1
    assert Counter(row for row in rows if row < 10) == dict.fromkeys(range(10), 150)


def test_a_changed_data_set_is_noticed(tmp_path):
    def order(answer, num_rows=5):
        names = [write_jsonl(tmp_path / "a.jsonl", numbered_rows(5)), str(tmp_path / "b.jsonl")]
        write_jsonl(tmp_path / "b.jsonl", numbered_rows(num_rows, answer))
        config = TrainConfig(dataset_name=names, num_eval_prompts=0)
        loaded = data.load_data(config, word_tokenizer(), WIDE, 0)
        return data.Order(loaded.num_per_dataset, seed=1, digests=loaded.digests)

    state, valid = order("four").state_dict(), "valid: the data as it was, or another output_dir to start anew"
    order("four").load_state_dict(state)
    for changed, now in ((("five",), 10), (("four", 6), 11), (("four four",), 10)):
        with pytest.raises(UserError) as raised:
            order(*changed).load_state_dict(state)
        assert str(raised.value) == (
            f"the data changed since the checkpoint in {tmp_path}/b.jsonl: [10] rows then, [{now}] now; {valid}"
        )
    order("five").load_state_dict({"sizes": [10], "drawn": [3]})  # of a version that kept no hash


def test_the_hash_knows_where_prompts_and_answers_end():
    def digest(*parts):
        rows = zip(parts[::2], parts[1::2], strict=True)
        return data.Examples(Example(0, *row, None, "", "", "") for row in rows).sha256()

    texts = [([1, 2], [3], [4], [5]), ([1], [2, 3], [4], [5]), ([1, 2], [3, 4], [5], [6]), ([1, 2], [3, 4])]
    assert len({digest(*text) for text in texts}) == len(texts)
    assert digest(*texts[0]) == digest(*texts[0])


# What is shown


def test_shown_example_has_its_boundaries():
    tokenizer = word_tokenizer("</think>")
    delimiter = data.choose_delimiter(tokenizer)
    fields = {"question": "one", "answer": "two three", "hard_spans": [[4, 9]]}
    shown = data.show_example(render_one(tokenizer, fields), tokenizer, delimiter, 32)
    assert shown.plain.splitlines() == [
        "f, row 1",
        "prompt          4 tokens | <bos> Question: one Reasoning:",
        "trace       <= 32 tokens | (sampled)",
        "delimiter        1 token | </think>",
        "answer          3 tokens | two three <eos>",
    ]
    (span,) = (span for span in shown.spans if "underline" in str(span.style))
    assert shown.plain[span.start : span.end] == " three"
    with (console := Console(width=200, force_terminal=False)).capture() as capture:
        console.print(shown)
    assert "\x1b" not in capture.get()


def test_a_prompt_that_closes_the_thinking_is_pointed_out():
    tokenizer = word_tokenizer("</think>", chat_template="user {{ messages[0]['content'] }} </think>")
    shown = data.show_example(render_one(tokenizer, QA[0]), tokenizer, data.choose_delimiter(tokenizer), 32)
    assert "note: the prompt holds </think> already" in shown.plain


# Real data


def test_real_data_sets(shared_data):
    names = [str(shared_data / "train" / name) for name in ("gsm8k_train.jsonl.gz", "dolly.jsonl.gz")]
    tokenizer = data.load_tokenizer(str(shared_data / "checkpoints/stories260K/hf"))
    data.check_vocabulary(tokenizer, 512)
    assert data.choose_delimiter(tokenizer) == data.Delimiter(512, "</think>", added=True)
    loaded = data.load_data(TrainConfig(dataset_name=names), tokenizer, data.Limits(256, 256), 64)
    assert [line.rpartition("/")[2] for line in loaded.lines] == [
        "gsm8k_train.jsonl.gz: 7,473 rows, question + answer",
        "dropped 380 of 7,473 rows: prompt over 256 tokens",
        "dolly.jsonl.gz: 5,003 rows, question + answer",
        "dropped 1,364 of 5,003 rows: answer over 256 tokens",
        "dropped 18 of 5,003 rows: prompt over 256 tokens",
    ]
    first = loaded.train[0]
    assert tokenizer.decode(first.prompt_ids[1:]).startswith("Question: Natalia sold clips to 48 of her friends")
    assert first.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(first.answer_ids) == "72</s>"


def test_real_chat_template(shared_data):
    tokenizer = data.load_tokenizer(str(shared_data / "tokenizers/smollm2_135m"))
    (ids,) = data.encode_prompts([USER], tokenizer)
    assert tokenizer.decode(ids).endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
