"""LoRA: peft's files in and out, its logits and gradients, a base that never changes, export, what is refused."""

import json
import math
import shutil

import peft
import pytest
import test_plan
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nrt_fast import Model, UserError, cli, loop, ops, run, train_step
from nrt_fast.config import PRESETS, EstimateConfig, TrainConfig
from nrt_fast.config_checks import PROJECTIONS
from nrt_fast.data import choose_delimiter
from nrt_fast.engine import Engine
from nrt_fast.model.inference import Inference
from nrt_fast.model.lora import Lora
from nrt_fast.model.peft_folder import ALL_LINEAR
from nrt_fast.optim import AdamW
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.plan import Sizes, training_bytes
from nrt_fast.reference.gather_rows import copies
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import ANSWER, TRACE, Example, PackedBatch

TOLERANCE = 2e-5
FAMILIES = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
TARGETS = [*((name,) for name in ALL_LINEAR), ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ALL_LINEAR]
PROMPTS, TRACES = ([5, 9, 11, 2, 7], [3]), ([[8, 2, 6], [1, 30, 31, 32, 9]], [[4, 4, 60, 61]])
IDS = [5, 9, 11, 2, 7, 8, 2, 6, 66, 0, 31, 12]


@pytest.fixture
def base(make_module, tmp_path):
    """A tiny model, and its folder."""
    module = make_module()
    module.save_pretrained(tmp_path / "base")
    return module, tmp_path / "base"


def by_peft(module, folder, rank=4, alpha=6, targets=ALL_LINEAR, **fields):
    """An adapter made and saved by peft, both of its matrices random; the live module."""
    torch.manual_seed(1)
    fields = {"init_lora_weights": False, "task_type": "CAUSAL_LM"} | fields
    adapted = peft.get_peft_model(
        module, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **fields)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


def adapted(folder, rank=4, alpha=6, targets=ALL_LINEAR, use_rslora=False, dtype="float32"):
    """Our model with a new adapter, both of its matrices random."""
    model = Model.from_pretrained(folder, dtype).with_adapter(Lora(rank, alpha, targets, use_rslora, str(folder)))
    model.adapter.flat.copy_(0.2 * torch.randn(model.adapter.flat.numel(), generator=torch.Generator().manual_seed(2)))
    return model


def assert_close(ours, theirs, atol=TOLERANCE):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def difference(ours, theirs):
    return (ours - theirs).abs().max()


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Files and logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_made_by_peft_gives_its_logits(family, make_module, reference_logits, tmp_path):
    model_type, config = FAMILIES[family]
    module = make_module(model_type, **config)
    module.save_pretrained(tmp_path / "base")
    before = reference_logits(module, IDS)
    theirs = by_peft(module, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    ours = Model.from_pretrained(tmp_path / "adapter")
    assert_close(ours.logits(IDS), reference_logits(theirs, IDS))
    assert_close(ours.without_adapter().logits(IDS), before)
    assert difference(before, ours.logits(IDS)) > 0.1


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_a_saved_adapter_loads_in_peft(targets, base, reference_logits, tmp_path):
    module, folder = base
    model = adapted(folder, targets=targets)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").eval()
    assert_close(model.logits(IDS), reference_logits(theirs, IDS))
    names = {name for name, _ in theirs.named_modules() if name.endswith("lora_A.default")}
    assert len(names) == 2 * len(targets)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    again = Model.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again.adapter.flat, model.adapter.flat) and again.adapter.lora == model.adapter.lora


def test_rslora_scales_by_the_root_of_the_rank(base, reference_logits, tmp_path):
    module, folder = base
    model = adapted(folder, rank=9, alpha=6, use_rslora=True)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").eval()
    assert model.adapter.lora.scale == 2 and Lora(9, 6, ALL_LINEAR).scale == 2 / 3
    assert_close(model.logits(IDS), reference_logits(theirs, IDS))


def test_a_pattern_of_target_modules_is_read_from_the_tensors(base, reference_logits, tmp_path):
    module, folder = base
    theirs = by_peft(module, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(folder), target_modules=r".*\.(self_attn|mlp)\..*_proj")
    ours = Model.from_pretrained(tmp_path / "adapter")
    assert ours.adapter.lora.targets == ALL_LINEAR == PROJECTIONS
    assert_close(ours.logits(IDS), reference_logits(theirs, IDS))


def test_bfloat16_adapters_are_saved_as_they_are(base, tmp_path):
    model = adapted(base[1], dtype="bfloat16")
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in model.adapter.tensors.items():
        assert torch.equal(stored[f"base_model.model.{name}"], tensor)


# A new adapter


def test_a_new_adapter_starts_as_pefts(base):
    model = Model.from_pretrained(base[1])
    before = model.logits(IDS)
    model = model.with_adapter(Lora(16, 32, ALL_LINEAR))
    model.adapter.reset(seed=3)
    assert torch.equal(model.logits(IDS), before)
    for name, tensor in model.adapter.tensors.items():
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            bound = math.sqrt(6 / (1 + 5) / tensor.shape[1])  # of kaiming_uniform_ with a = sqrt(5)
            assert 0.95 * bound < tensor.abs().max() <= bound and tensor.mean().abs() < 0.1 * bound
    first = model.adapter.flat.clone()
    model.adapter.reset(seed=3)
    assert torch.equal(model.adapter.flat, first)
    model.adapter.reset(seed=4)
    assert not torch.equal(model.adapter.flat, first)


def test_a_clone_has_an_adapter_of_its_own_on_the_same_weights(base):
    model = adapted(base[1])
    clone = model.clone()
    before = model.logits(IDS)
    model.adapter.flat.mul_(2)
    assert torch.equal(clone.logits(IDS), before)
    assert difference(model.logits(IDS), before) > 0.1
    assert clone.weights.flat.data_ptr() == model.weights.flat.data_ptr() == model.without_adapter().embed.data_ptr()


def test_a_grown_model_keeps_its_adapter(base):
    model = adapted(base[1])
    assert torch.equal(model.grown(2, copy_of=7).logits(IDS)[:, :67], model.logits(IDS))


# Gradients


def packed_batch():
    prompts = torch.tensor([token for row in PROMPTS for token in row])
    targets = torch.tensor([token for group in TRACES for row in group for token in row])
    lengths = [len(row) for group in TRACES for row in group]
    offsets = [torch.tensor([0, *map(len, PROMPTS)]).cumsum(0), torch.tensor([0, *lengths]).cumsum(0)]
    entries = torch.tensor([[0, 0, 2], [1, 2, 3]])
    source, positions, cu_seqlens, hidden_A, rows_A = ops.pack_index(entries, *offsets)
    tokens = torch.cat([prompts, targets])[source]
    rows = hidden_A, *copies(hidden_A, len(tokens)), rows_A
    return PackedBatch(tokens, positions, cu_seqlens, torch.tensor([2, 1]), *rows, loss=None), targets


def padded_loss(module):
    """Summed log-probability of the targets, by transformers on padded rows."""
    rows = [(prompt, row) for prompt, group in zip(PROMPTS, TRACES) for row in group]
    length = max(len(prompt) + len(row) for prompt, row in rows)
    ids = torch.tensor([prompt + row + [0] * (length - len(prompt) - len(row)) for prompt, row in rows])
    mask = torch.tensor([[position < len(p) + len(r) for position in range(length)] for p, r in rows])
    logprobs = module(ids, attention_mask=mask.long(), use_cache=False).logits.log_softmax(-1)
    return sum(
        logprobs[index, len(prompt) + place - 1, token]
        for index, (prompt, row) in enumerate(rows)
        for place, token in enumerate(row)
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", TARGETS[::3], ids="+".join)
def test_gradients_are_those_of_peft(targets, recompute, base, tmp_path):
    module, folder = base
    theirs = by_peft(module, tmp_path / "adapter", targets=targets)
    edit(tmp_path / "adapter", base_model_name_or_path=str(folder))
    padded_loss(theirs).backward()
    model = Model.from_pretrained(tmp_path / "adapter")
    optimizer = AdamW(model.trained.flat, model.trained.leaves.values(), 0, (0.9, 0.95), 1e-15, 0.0)
    batch, targets_A = packed_batch()
    logits = model.packed(batch, recompute)[batch.hidden_A] @ model.head.T
    logits.log_softmax(-1).gather(1, targets_A[batch.rows_A][:, None]).sum().backward()
    exact = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(exact) == len(model.adapter.tensors) == 4 * len(targets)
    for name, tensor in model.adapter.tensors.items():
        start = tensor.storage_offset()
        ours = optimizer.grad[start : start + tensor.numel()].view_as(tensor)
        true = exact[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        assert (ours - true).norm() <= 1e-4 * true.norm(), name
    assert not any(tensor.requires_grad for tensor in model.weights.tensors.values())
    assert not model.head.requires_grad and not model.layers[0].input_norm.requires_grad


# The passes


@pytest.mark.parametrize("targets", [("q_proj",), ALL_LINEAR], ids="+".join)
def test_sampler_scorer_and_trainer_agree(targets, base):
    model, uids = adapted(base[1], targets=targets), [4, 7]
    engine, answers = Engine(model, delimiter_id=5, eos_id=2), [[8, 9, 2], [11, 2]]
    sampling = {"num_generations": 5, "max_trace_length": 9, "temperature": 1.0, "seed": 0, "step": 1}
    thoughts = engine.think(list(PROMPTS), answers, uids, **sampling)
    examples = [Example(uid, prompt, answer, None, "", "", "") for uid, prompt, answer in zip(uids, PROMPTS, answers)]
    tokens = loss_tokens(
        examples, thoughts.traces, thoughts.scores.logprobs, [torch.linspace(-1, 1, 5)] * 2, [True] * 2,
        [[torch.ones(len(answer))] * 5 for answer in answers], PRESETS["nrt-ws"], 5, 1.0, 20,
    )  # fmt: skip
    optimizer = AdamW(model.trained.flat, model.trained.leaves.values(), 0, (0.9, 0.95), 1e-15, 0.0)
    before = model.weights.flat.clone()
    batches = pack(tokens, 100, torch.device("cpu"))
    stats = train_step.train_step(model, optimizer, tokens, batches, PRESETS["nrt-ws"], 1e-2, 1.0, True, None)
    for kind in (TRACE, ANSWER):
        assert_close(stats.logprobs_A[tokens.kind_A == kind], tokens.old_logprobs_A[tokens.kind_A == kind])
    assert torch.equal(model.weights.flat, before)
    # The engine takes the changed adapter over at its next call.
    new = engine.score(list(PROMPTS), thoughts.traces.trace_ids, answers).logprobs[0][0]
    fresh = Engine(model, delimiter_id=5, eos_id=2).score(list(PROMPTS), thoughts.traces.trace_ids, answers)
    assert torch.equal(new, fresh.logprobs[0][0])
    assert difference(new, thoughts.scores.logprobs[0][0]) > 1e-3


def test_constant_matrices_are_packed_once_for_all_models_on_them(base, monkeypatch):
    packed = []
    pack_panels = ops.pack_panels
    monkeypatch.setattr(
        ops, "pack_panels", lambda weights, panels: packed.append(weights) or pack_panels(weights, panels)
    )
    passes = Inference(model := adapted(base[1]))
    assert len(packed) == 4 * 2 + 1  # the projections of two layers, and the head
    passes.refresh()
    assert len(packed) == 4 * 2 + 1 + 2 * 4 * 2  # A and B of each
    Inference(model.without_adapter(), passes).refresh()
    assert len(packed) == 4 * 2 + 1 + 2 * 4 * 2
    addresses = passes.addresses()
    assert {tensor.data_ptr() for tensor in model.adapter.tensors.values()} <= set(addresses)
    assert model.weights.flat.data_ptr() in addresses


def test_on_cuda_parameters_are_read_in_place(base, monkeypatch):
    """The passes of a GPU, run on a CPU: weights and A where they are, B in blocks that ``refresh`` makes."""
    model = adapted(base[1], targets=("q_proj", "v_proj", "down_proj"))
    expected = model.logits(IDS)
    with monkeypatch.context() as patch:
        patch.setattr(Inference, "device", torch.device("cuda"))
        passes = Inference(model)
    own = {tensor.data_ptr() for tensor in (*model.weights.tensors.values(), *model.adapter.tensors.values())}
    assert set(passes.addresses()) == own
    for layer in passes._layers:
        for projection in (layer.qkv.base, layer.qkv.down, layer.out, layer.gate_up, layer.down.base, layer.down.down):
            assert {weight.data_ptr() for weight in projection.weights} <= own
    blocks = [layer.qkv.up.weight.data_ptr() for layer in passes._layers]
    monkeypatch.setattr("nrt_fast.model.model.Inference", lambda model: passes)
    assert_close(model.logits(IDS), expected)
    model.adapter.flat.mul_(2)
    changed = model.logits(IDS)
    assert difference(changed, expected) > 0.1
    assert [layer.qkv.up.weight.data_ptr() for layer in passes._layers] == blocks
    monkeypatch.undo()
    assert_close(changed, model.logits(IDS))


# Runs


def copy_of_starter(folder):
    return shutil.copytree(MODEL_DIR, folder)


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """A run of LoRA on a copy of the starter: (its folder, the model's)."""
    folder = tmp_path_factory.mktemp("lora")
    model = copy_of_starter(folder / "starter")
    fields = {"use_peft": True, "lora_r": 4, "lora_target_modules": "q_proj,down_proj", "learning_rate": 1e-2}
    loop.train(tiny_run(folder / "run", model_name_or_path=str(model), **fields))
    return folder / "run", model


def test_a_run_leaves_the_model_as_it_is_and_an_adapter_beside_it(trained, tiny_run, reference_logits):
    folder, model = trained
    for name in ("model.safetensors", "tokenizer.json"):
        assert (model / name).read_bytes() == (MODEL_DIR / name).read_bytes()
    assert (folder / "final/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not (folder / "final/model.safetensors").exists() and not list(folder.glob("checkpoint-3/frozen*"))
    config = json.loads((folder / "final/adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 32)
    assert config["target_modules"] == ["q_proj", "down_proj"] and config["base_model_name_or_path"] == str(model)
    ours = Model.from_pretrained(folder / "final")
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = reference_logits(module, IDS)
    theirs = peft.PeftModel.from_pretrained(module, folder / "final").eval()
    assert_close(ours.logits(IDS), reference_logits(theirs, IDS), atol=1e-4)  # logits of 20
    assert difference(ours.logits(IDS), before) > 1e-3


@pytest.mark.parametrize("fields", [{"baseline": "frozen"}, {"beta": 0.1}, {"baseline": "ema"}], ids=str)
def test_no_weights_are_copied_for_a_baseline(fields, tiny_run, tmp_path):
    made = run.prepare(tiny_run(tmp_path, use_peft=True, **fields))
    other = made.ema.model if made.ema else made.frozen
    assert other.weights.flat.data_ptr() == made.model.weights.flat.data_ptr()
    assert (other.adapter is None) == (made.ema is None)
    assert made.optimizer.grad.numel() == made.model.adapter.flat.numel() < made.model.weights.flat.numel() / 4
    assert made.state_tensors().keys() == ({"ema"} if made.ema else set())


def test_a_given_adapter_goes_on(trained, tiny_run, tmp_path):
    folder, model = trained
    config = tiny_run(tmp_path / "run", use_peft=True, model_name_or_path=str(folder / "final"), beta=0.1)
    made = run.prepare(config)
    assert torch.equal(made.model.adapter.flat, Model.from_pretrained(folder / "final").adapter.flat)
    assert (made.config.lora_r, made.config.lora_target_modules) == (4, ["q_proj", "down_proj"])
    start = made.model.logits(IDS)
    assert torch.equal(made.frozen.logits(IDS), start)
    made.model.adapter.flat.mul_(2)
    assert torch.equal(made.frozen.logits(IDS), start)
    loop.train(config)
    told = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(model)


def test_an_adapter_has_a_learning_rate_of_its_own(tiny_run, tmp_path):
    rates = [
        run.prepare(tiny_run(tmp_path, use_peft=use_peft, learning_rate=None)).config.learning_rate
        for use_peft in (False, True)
    ]
    assert rates[1] == pytest.approx(10 * rates[0])


def test_the_plan_has_an_optimizer_for_the_adapter_alone():
    plans = [
        run.estimate(EstimateConfig(device="cuda", device_memory_gib=24, use_peft=use_peft, dtype="bfloat16"))
        for use_peft in (False, True)
    ]
    full, lora = ({part.name: part.num_bytes for part in plan.parts} for plan in plans)
    # a layer has 4 projections of 128 x 128 and 3 of 128 x 256
    num_parameters = 4 * 16 * (4 * 256 + 3 * 384)
    assert lora["gradients"] == 4 * num_parameters and lora["optimizer"] <= 10 * num_parameters
    assert lora["weights"] == full["weights"]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_takes_what_was_planned(recompute, make_module, tmp_path):
    config = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 512}
    make_module(**config).save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path).with_adapter(Lora(2, 4, ALL_LINEAR))
    model.adapter.reset(0)
    optimizer = AdamW(model.trained.flat, model.trained.leaves.values(), 0, (0.9, 0.95), 1e-15, 0.0)
    batch = test_plan.packed_batch(512, 4, 8, 32, 64, 16)
    with test_plan.PeakBytes(model.weights.flat, model.adapter.flat, optimizer.grad) as measured:
        hidden_AD = train_step.loss_rows(model.packed(batch, recompute), batch)
        *_, grad_AD = train_step._loss(hidden_AD, model.head, batch.loss, None, None, None, PRESETS["nrt-ws"], 1.0)
        hidden_AD.backward(grad_AD)
    sizes = Sizes(32, 64, 16, 8, recompute=recompute, adapter=model.adapter.flat.numel())
    predicted = training_bytes(model.config, "float32", "cpu", len(batch.tokens_T), sizes)
    assert 0.95 < predicted / measured.peak < 1.1


def test_answers_and_scores_of_an_adapter(trained, tmp_path, capsys):
    folder, _ = trained
    question = ["sort 2 8 1 4 0 , which comes fifth ?", "--max_trace_length=8", "--max_answer_length=8"]
    assert cli.main(["generate", *question, "--model_name_or_path", str(folder / "final")]) == 0
    assert capsys.readouterr().out.strip()
    argv = ["--num_prompts=2", "--num_generations=2", f"--output_file={tmp_path / 's.jsonl'}", "--max_trace_length=8"]
    assert cli.main(["score", *argv, "--model_name_or_path", str(folder / "checkpoint-3")]) == 0
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2


# Export


@pytest.fixture
def export(capsys):
    def run_export(folder, output_dir, *argv):
        code = cli.main(["export", f"--model_name_or_path={folder}", f"--output_dir={output_dir}", *argv])
        told = capsys.readouterr()
        return (told.out if code == 0 else told.err.removeprefix("nrt-fast: error: ")).rstrip("\n")

    return run_export


def test_merged_is_unmerged(trained, export, reference_logits, tmp_path):
    folder, model = trained
    base32 = copy_of_starter(tmp_path / "fp32")
    wide = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(wide, base32 / "model.safetensors", metadata={"format": "pt"})
    adapter = shutil.copytree(folder / "final", tmp_path / "adapter")
    edit(adapter, base_model_name_or_path=str(base32))
    told = export(adapter, tmp_path / "merged", "--merge_lora=true")
    assert told == f"{tmp_path / 'merged'} holds a model: {base32} with the adapter merged into its weights"
    merged, unmerged = Model.from_pretrained(tmp_path / "merged"), Model.from_pretrained(adapter)
    assert_close(merged.logits(IDS), unmerged.logits(IDS), atol=1e-4)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(reference_logits(module, IDS), unmerged.logits(IDS), atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 180
    assert (tmp_path / "merged/generation_config.json").is_file()


def test_a_merged_weight_is_rounded_once(trained, export, tmp_path):
    folder, model = trained
    export(folder / "checkpoint-3", tmp_path / "merged", "--merge_lora=true")
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "merged"))
    adapter = load_file(folder / "checkpoint-3/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        exact = tensor
        if f"{key}A.weight" in adapter:
            exact = (tensor.float() + 8 * (adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"])).bfloat16()
            assert not torch.equal(exact, tensor)
        assert torch.equal(after[name], exact)


def test_export_of_an_adapter_or_a_model_alone(trained, finished, export, tmp_path):
    folder, model = trained
    told = export(folder / "checkpoint-3", tmp_path / "adapter")
    assert told.endswith(f"holds an adapter of {model}; --merge_lora true makes it a model")
    names = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == names
    Model.from_pretrained(tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    assert export(finished / "checkpoint-5", tmp_path / "model").endswith("model holds a model")
    names = ["config.json", "generation_config.json", "model.safetensors", *names[2:]]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    assert torch.equal(
        Model.from_pretrained(tmp_path / "model").weights.flat, Model.from_pretrained(finished / "final").weights.flat
    )


def test_exports_that_cannot_be(trained, finished, export, tmp_path):
    folder, _ = trained
    assert "is there and not empty" in export(folder / "final", folder)
    assert "has no adapter_config.json" in export(finished / "final", tmp_path / "new", "--merge_lora=true")
    assert "no such folder" in export(tmp_path / "nothing", tmp_path / "new")
    assert "has no config.json" in export(tmp_path, tmp_path / "new")
    adapter = shutil.copytree(folder / "final", tmp_path / "adapter")
    edit(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    assert "base_model_name_or_path of" in export(adapter, tmp_path / "new", "--merge_lora=true")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*.tmp"))


def test_export_needs_both_folders(capsys):
    assert cli.main(["export", "--output_dir=x"]) == 2
    assert "model_name_or_path is needed" in capsys.readouterr().err
    assert cli.main(["export", "--help"]) == 0
    assert "--merge_lora {true,false}" in capsys.readouterr().out


# What is refused

NOT_DONE = {
    "dora": ({"use_dora": True}, "use_dora True is not supported; valid: plain LoRA"),
    "bias": ({"bias": "all"}, "bias 'all' is not supported"),
    "modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern .* is not supported"),
    "layers": ({"layers_to_transform": [0]}, r"layers_to_transform \[0\] is not supported"),
    "kind": ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported"),
    "start": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the model's own weights"),
    "unknown": ({"use_new_thing": True}, "use_new_thing True is not supported"),
    "base": ({"base_model_name_or_path": None}, "base_model_name_or_path, the model it belongs to, is not there"),
    "no-base": ({"base_model_name_or_path": "./gone"}, r"base_model_name_or_path of .*: model ./gone: no such folder"),
    "rank": ({"r": 0}, "r is 0"),
    "alpha": ({"lora_alpha": "much"}, "is not the configuration of a LoRA adapter"),
    "other-rank": ({"r": 5}, r"has shape \[4, 48\], \[5, 48\] is needed"),
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_adapters_that_are_not_plain_lora(name, base, tmp_path):
    fields, message = NOT_DONE[name]
    adapted(base[1]).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", **fields)
    with pytest.raises(UserError, match=message):
        Model.from_pretrained(tmp_path / "adapter")


def test_dropout_is_for_training_alone(base, reference_logits, tmp_path):
    module, folder = base
    theirs = by_peft(module, tmp_path / "adapter", lora_dropout=0.5)
    edit(tmp_path / "adapter", base_model_name_or_path=str(folder))
    assert_close(Model.from_pretrained(tmp_path / "adapter").logits(IDS), reference_logits(theirs, IDS))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "missing": (lambda tensors: tensors.pop(Q0), f"tensor {Q0} is missing"),
    "nan": (lambda tensors: tensors[Q0].fill_(math.nan), f"{Q0} holds NaN or Inf"),
    "layer": (lambda tensors: tensors.update({Q0.replace("s.0", "s.7"): tensors[Q0] + 1}), "has no such projection"),
    "module": (lambda tensors: tensors.update({"base_model.model.lm_head": tensors[Q0] + 1}), "is no LoRA matrix"),
    "empty": (lambda tensors: tensors.clear(), "holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tensors(name, base, tmp_path):
    change, message = BROKEN[name]
    adapted(base[1]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        Model.from_pretrained(tmp_path)


def test_missing_and_unreadable_files(base, tmp_path):
    adapted(base[1]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        Model.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"has an adapter_config\.json but no adapter_model\.safetensors"):
        Model.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not the configuration of a LoRA adapter"):
        Model.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_r": 8}, "lora_r cannot take effect: use_peft is false"),
        ({"use_rslora": True}, "use_rslora cannot take effect: use_peft is false"),
        ({"use_peft": True, "lora_r": 0}, "lora_r is 0; it should be at least 1"),
        (
            {"use_peft": True, "lora_target_modules": "q_proj,lm_head"},
            "'lm_head' is unknown; valid: all-linear, or some",
        ),
        ({"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]}, "'all-linear' is unknown"),
        ({"use_peft": True, "lora_target_modules": ""}, "lora_target_modules: is empty"),
    ],
    ids=str,
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**fields).check()


def test_an_adapter_is_not_trained_as_a_model(trained, tiny_run, tmp_path):
    name = str(trained[0] / "final")
    with pytest.raises(UserError, match="is a LoRA adapter: --use_peft true goes on training it; nrt-fast export"):
        loop.train(tiny_run(tmp_path, model_name_or_path=name))
    with pytest.raises(UserError, match=r"lora_r cannot take effect: .* is an adapter that has its own"):
        loop.train(tiny_run(tmp_path, model_name_or_path=name, use_peft=True, lora_r=8))


def test_without_peft_the_install_command_is_told(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("nrt_fast.model.peft_folder.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"peft, which is not installed: pip install 'nrt-fast\[peft\]'"):
        loop.train(tiny_run(tmp_path, use_peft=True))


def test_a_delimiter_is_never_added_under_an_adapter():
    vocabulary = {text: index for index, text in enumerate(["<unk>", "<eos>", "a", "###", "~"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(UserError, match=r"--delimiter with a token of the vocabulary, for example ### ~, or"):
        choose_delimiter(tokenizer, may_add=False)
    assert len(tokenizer) == 5
    assert choose_delimiter(tokenizer, "###", may_add=False).id == 3
