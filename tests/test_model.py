"""The decoder: extend, decode and packed against transformers, and Hugging Face folders in and out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nrt_fast import Model, ops
from nrt_fast.config import ScoreConfig
from nrt_fast.data import Delimiter
from nrt_fast.kv_cache import NO_PREFIX, Sequence
from nrt_fast.model.inference import Inference
from nrt_fast.reference.gather_rows import copies
from nrt_fast.source import open_source
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import PackedBatch

TOLERANCE = 2e-5
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {"rope_theta": 500.0}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 12}),
    "llama-with-keys-it-ignores": ("llama", {"sliding_window": 5}),
    "llama-llama3-rope": ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-yarn-rope": (
        "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-with-keys-it-ignores": ("mistral", {"sliding_window": None, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-with-keys-it-ignores": ("qwen2", {"attention_bias": True}),
    "qwen2-window-in-layer-1": ("qwen2", {"max_window_layers": 1, **QWEN_WINDOW}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_theta": 1e6}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-window-in-layer-0": (
        "qwen3", {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], **QWEN_WINDOW},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def module(request, make_module):
    model_type, config = FAMILIES[request.param]
    return make_module(model_type, **config)


@pytest.fixture(scope="module", params=["from_hf", "from_pretrained"])
def model(request, module, tmp_path_factory):
    if request.param == "from_hf":
        return Model.from_hf(module)
    folder = tmp_path_factory.mktemp("model")
    module.save_pretrained(folder)
    return Model.from_pretrained(folder)


def random_ids(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 67, (length,), generator=generator).tolist() for length in lengths]


def flat(rows):
    return torch.tensor([token for row in rows for token in row])


def head_logits(model, hidden):
    return ops.linear_logits(hidden, model.head).detach()


def assert_close(ours, reference):
    torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def passes(model):
    passes = Inference(model)
    passes.refresh()
    return passes


def reserved(cache, *lengths):
    sequences = [Sequence() for _ in lengths]
    assert all(cache.reserve(sequence, length) for sequence, length in zip(sequences, lengths))
    return sequences


def test_logits_of_one_sequence(model, module, reference_logits):
    (ids,) = random_ids(40)
    assert_close(model.logits(ids), reference_logits(module, ids))


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("cuts", [(1, 3, 2), (5, 9, 0), (0, 0, 0)], ids=str)
def test_extend_in_two_pieces(cuts, page_size, passes, module, reference_logits):
    rows = random_ids(11, 9, 1)
    cache = passes.new_cache(1 << 20, page_size)
    own = reserved(cache, *map(len, rows))
    pieces = [[row[:cut] for row, cut in zip(rows, cuts)], [row[cut:] for row, cut in zip(rows, cuts)]]
    logits = [[], [], []]
    for piece in filter(any, pieces):
        hidden = passes.extend(cache, [(NO_PREFIX, [sequence]) for sequence in own], piece)
        for row, part in zip(logits, passes.logits(hidden).split(list(map(len, piece)))):
            row.append(part)
        for sequence, ids in zip(own, piece):
            sequence.length += len(ids)
    for ids, parts in zip(rows, logits):
        assert_close(torch.cat(parts), reference_logits(module, ids))


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_decode_token_by_token_beside_the_shared_prompt(page_size, passes, module, reference_logits):
    prompts, lengths = random_ids(9, 3), (6, 2, 9, 1, 4, 7)
    traces = random_ids(*lengths, seed=1)
    cache = passes.new_cache(1 << 20, page_size)
    starts = reserved(cache, *map(len, prompts))
    hidden = passes.extend(cache, [(NO_PREFIX, [start]) for start in starts], prompts)
    for start, ids in zip(starts, prompts):
        start.length = len(ids)
    logits = [[row] for row in passes.logits(hidden[[8, 11]]).repeat_interleave(3, dim=0)]
    own = reserved(cache, *[max(lengths) + 1] * 6)
    for position in range(max(lengths)):
        # Rows that have ended are fed junk, as in a rollout, and must not notice.
        tokens = torch.tensor([ids[position] if position < len(ids) else 5 for ids in traces])
        rows = cache.rows([(starts[0], own[:3]), (starts[1], own[3:])])
        for index, new in enumerate(passes.logits(passes.decode(cache, rows, tokens))):
            if position < lengths[index]:
                own[index].length += 1
                logits[index].append(new)
    for index, (ids, rows) in enumerate(zip(traces, logits)):
        prompt = prompts[index // 3]
        assert_close(torch.stack(rows), reference_logits(module, prompt + ids)[len(prompt) - 1 :])


PACKED = {  # prompt lengths, lengths of each one's targets
    "ragged": ([9, 1, 14], [[8, 2], [5], [1, 12, 7]]),
    "one-trace": ([6], [[5]]),
    "equal-traces": ([6], [[5, 5, 5]]),
    "equal-groups": ([4, 4], [[5, 5], [5, 5]]),
    "nothing-but-first-tokens": ([3, 5], [[1], [1, 1]]),
}


@pytest.mark.parametrize("shape", PACKED)
def test_packed_groups(shape, model, module, reference_logits):
    prompt_lengths, target_lengths = PACKED[shape]
    prompts = random_ids(*prompt_lengths)
    targets = random_ids(*(length for group in target_lengths for length in group), seed=1)
    offsets = [torch.tensor([0] + [len(row) for row in rows]).cumsum(0) for rows in (prompts, targets)]
    ends = torch.tensor([len(group) for group in target_lengths]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    entries = torch.stack([torch.arange(len(prompts)), starts, ends], dim=1).flip(0)
    source, positions, cu_seqlens, hidden_A, rows_A = ops.pack_index(entries, *offsets)
    tokens = torch.cat([flat(prompts), flat(targets)])[source]
    rows = hidden_A, *copies(hidden_A, len(tokens)), rows_A
    batch = PackedBatch(tokens, positions, cu_seqlens, entries[:, 2] - entries[:, 1], *rows, loss=None)
    logits = torch.empty(len(rows_A), 67)
    logits[rows_A] = head_logits(model, model.packed(batch))[hidden_A]
    rows = iter(logits.split([len(row) for row in targets]))
    for prompt, start, end in zip(prompts, starts.tolist(), ends.tolist()):
        for ids in targets[start:end]:
            assert_close(next(rows), reference_logits(module, prompt + ids)[len(prompt) - 1 : -1])


def test_a_saved_model_loads_in_transformers(model, module, reference_logits, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    (ids,) = random_ids(30)
    assert torch.equal(reference_logits(loaded, ids), reference_logits(module, ids))
    assert type(loaded) is type(module)


@pytest.mark.parametrize("module", ["llama-tied", "qwen3"], indirect=True)
def test_from_hf_shares_the_storage(module, reference_logits):
    model = Model.from_hf(module)
    parameters = dict(module.named_parameters())
    assert parameters.keys() <= model.weights.tensors.keys()
    for name, parameter in parameters.items():
        assert model.weights.tensors[name].data_ptr() == parameter.data_ptr()
    (ids,) = random_ids(12)
    before = model.logits(ids)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.1)
    assert not torch.allclose(model.logits(ids), before, atol=0.1)
    assert_close(model.logits(ids), reference_logits(module, ids))


@pytest.mark.parametrize("module", ["llama", "qwen2-tied"], indirect=True)
def test_sharded_folder(module, reference_logits, tmp_path):
    module.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    (ids,) = random_ids(20)
    assert_close(Model.from_pretrained(tmp_path).logits(ids), reference_logits(module, ids))


@pytest.mark.parametrize("module", ["llama", "llama-tied"], indirect=True)
def test_large_models_are_saved_in_shards(module, reference_logits, tmp_path, monkeypatch):
    monkeypatch.setattr("nrt_fast.model.model.MAX_SHARD_SIZE", "10KB")
    Model.from_hf(module).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (ids,) = random_ids(20)
    assert torch.equal(
        reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), reference_logits(module, ids)
    )


@pytest.mark.parametrize("module", ["llama", "llama-tied", "qwen2"], indirect=True)
def test_grown_copies_rows(module, reference_logits, tmp_path):
    module.save_pretrained(tmp_path / "small")
    model = Model.from_pretrained(tmp_path / "small")
    grown = model.grown(2, copy_of=7)
    (ids,) = random_ids(20)
    before, after = model.logits(ids), grown.logits(ids)
    assert torch.equal(after[:, :67], before)
    assert torch.equal(after[:, 67:], before[:, [7, 7]])
    assert torch.equal(grown.logits([67, 3]), grown.logits([7, 3]))
    grown.save_pretrained(tmp_path / "large")
    assert_close(after, reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "large"), ids))


@pytest.mark.parametrize("module", ["llama", "llama-tied"], indirect=True)
def test_a_copied_row_is_one_in_embedding_and_head(module, tmp_path):
    module.save_pretrained(tmp_path)
    model, copied = Model.from_pretrained(tmp_path), Model.from_pretrained(tmp_path)
    copied.copy_row(7, 60)
    (ids,) = random_ids(20)
    ids = [token for token in ids if token != 60]
    expected = model.logits(ids)
    expected[:, 60] = expected[:, 7]
    assert torch.equal(copied.logits(ids), expected)
    assert torch.equal(copied.logits([60, 3]), copied.logits([7, 3]))


@pytest.mark.parametrize("num_padding", [0, 12])
def test_an_added_delimiter_starts_as_eos(num_padding, tmp_path):
    """In a row of its own, or in one that the vocabulary is padded with beyond the tokenizer."""
    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.write_text(path.read_text().replace("</think>", "<other>"))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    padding = torch.full((num_padding, config["hidden_size"]), 1e-5)
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], padding])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    num_rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": num_rows + num_padding}))
    source = open_source(ScoreConfig(model_name_or_path=str(folder), device="cpu"))
    embed = source.engine(ScoreConfig(), 1 << 20).model.embed
    assert source.delimiter == Delimiter(num_rows, "</think>", added=True)
    assert embed.shape[0] == source.shape.vocab_size == num_rows + (num_padding or 1)
    assert torch.equal(embed[num_rows], embed[source.tokenizer.eos_token_id])
    assert torch.equal(embed[num_rows + 1 :], padding[1:])


@pytest.mark.parametrize("module", ["qwen3"], indirect=True)
def test_a_clone_has_weights_of_its_own(module, tmp_path):
    module.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    clone = model.clone()
    (ids,) = random_ids(12)
    before = model.logits(ids)
    model.weights.flat.mul_(1.5)
    assert torch.equal(clone.logits(ids), before)
    assert not torch.allclose(model.logits(ids), before, atol=0.1)


@pytest.mark.parametrize("module", ["llama-biases", "qwen3"], indirect=True)
def test_owned_weights_are_one_flat_tensor(module, tmp_path):
    module.save_pretrained(tmp_path)
    weights = Model.from_pretrained(tmp_path).weights
    parameters = dict(module.named_parameters())
    assert weights.flat.numel() == sum(parameter.numel() for parameter in parameters.values())
    for name, parameter in parameters.items():
        start = weights.tensors[name].storage_offset()
        assert torch.equal(weights.flat[start : start + parameter.numel()].view_as(parameter), parameter)
        assert (start < weights.num_matrix_elements) == (parameter.ndim == 2)


@pytest.mark.parametrize("module", ["llama"], indirect=True)
def test_bfloat16_rounds_the_weights_only_once(module, tmp_path):
    module.save_pretrained(tmp_path)
    weights = Model.from_pretrained(tmp_path, dtype="bfloat16").weights
    for name, parameter in module.named_parameters():
        assert torch.equal(weights.tensors[name], parameter.bfloat16())


@pytest.mark.parametrize("module", ["llama"], indirect=True)
def test_end_of_text_comes_from_both_configs(module, tmp_path):
    module.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert Model.from_pretrained(tmp_path).eos_ids == (2, 9)
    Model.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert Model.from_pretrained(tmp_path / "saved").eos_ids == (2, 9)


def test_rotary_embeddings_are_named_for_old_and_new_readers(make_module, tmp_path):
    """transformers 4 knows no rope_parameters, and would take its defaults."""
    rope = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}  # which transformers puts there
    scaled = make_module("llama", rope_scaling=dict(rope), rope_theta=5e5)
    for folder, module, scaling in (("scaled", scaled, rope), ("plain", make_module("llama"), None)):
        Model.from_hf(module).save_pretrained(tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["rope_theta"] == (5e5 if scaling else 10_000.0)
        assert config["rope_scaling"] == scaling
        assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
