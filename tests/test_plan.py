"""The memory plan: known layouts, what autograd really keeps, what is refused, and the estimate without weights."""

import weakref
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nrt_fast import cli, engine, plan, run, train_step
from nrt_fast.config import Objective
from nrt_fast.model import Model
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.weights import OwnedWeights, parameter_shapes
from nrt_fast.optim import AdamW
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.plan import GIB, Sizes, num_parameters, plan_inference, plan_training
from nrt_fast.reference.adamw import BLOCK
from nrt_fast.types import Example, Traces, UserError

LLAMA_8B = SimpleNamespace(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, tie_word_embeddings=False, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False,
)  # fmt: skip
LLAMA_3B = SimpleNamespace(**vars(LLAMA_8B) | {
    "hidden_size": 3072, "intermediate_size": 8192, "num_layers": 28, "num_heads": 24, "tie_word_embeddings": True,
})  # fmt: skip
SHORT = Sizes(512, 600, 200, 8, batch_tokens=32768)
TINY_SIZES = Sizes(8, 8, 4, 2, batch_tokens=64)


def gib(plan, name):
    return next(part.num_bytes for part in plan.parts if part.name == name) / GIB


def tiny_config(model_type, hf_config):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **hf_config)


# Known layouts


def test_8b_on_one_h200():
    told = plan_training(LLAMA_8B, "bfloat16", "cuda", 139 * GIB, SHORT, shrink=True)
    assert gib(told, "weights") == pytest.approx(14.96, abs=0.005)
    static = sum(gib(told, name) for name in ("weights", "gradients", "optimizer"))
    assert static == pytest.approx(119.7, abs=0.05), "16 bytes a parameter"
    left = 139 - static - gib(told, "context") - gib(told, "graphs")
    assert left == pytest.approx(15.8, abs=0.05)
    assert told.token_bytes == 128 * 1024
    total = sum(part.num_bytes for part in told.parts) + told.cache_bytes - told.lent_bytes
    assert total == 139 * GIB, "the cache gets what is left"
    assert told.lent_bytes == 4 * 8_030_261_248 <= told.cache_bytes, "the cache has the gradients' memory too"
    assert "lent to keys and values" in str(told) and "with the gradients' 29.92: " in str(told)


def test_moments_have_as_many_bits_as_fit():
    def chosen(gib, **sizes):
        shape = LLAMA_3B if gib < 64 else LLAMA_8B
        return plan_training(shape, "bfloat16", "cuda", gib * GIB, replace(SHORT, **sizes), shrink=True)

    assert [chosen(gib).sizes.moments for gib in (139, 110, 92)] == ["float32", "bfloat16", "int8"]
    for moments, num_bytes in (("float32", 10), ("bfloat16", 6), ("int8", 4 + 8 / 256)):
        told = chosen(139, moments=moments)
        assert told.sizes.moments == moments, "what is told stays"
        assert gib(told, "optimizer") * GIB == pytest.approx(num_bytes * 8_030_261_248, abs=8)
    assert plan_training(LLAMA_3B, "float32", "cuda", 139 * GIB, SHORT, shrink=True).sizes.moments == "float32"
    assert plan_training(LLAMA_3B, "bfloat16", "cpu", 139 * GIB, SHORT, shrink=True).sizes.moments == "float32"
    assert chosen(24, adapter=10**7).sizes.moments == "float32", "an adapter's are few"


def test_a_cpu_lends_more_than_its_budget_where_the_gradients_are_larger():
    told = plan_training(LLAMA_3B, "float32", "cpu", 139 * GIB, SHORT, shrink=True)
    assert told.cache_bytes == told.lent_bytes == 4 * num_parameters(LLAMA_3B) > plan.CPU_CACHE_BYTES
    assert "  keys and values       0.00  with the gradients' 11.97: " in str(told)


def test_3b_keys_and_values():
    told = plan_inference(LLAMA_3B, "bfloat16", "cuda", 79 * GIB, SHORT)
    assert told.token_bytes == 112 * 1024
    assert gib(told, "weights") == pytest.approx(2 * 2.99, abs=0.01)
    assert "packed weights" not in str(told), "CUDA reads the parameters in place"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_counted_exactly(model_type, tied, bias):
    from conftest import TINY

    config = TINY | {"tie_word_embeddings": tied}
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = bias
    if model_type == "llama":
        config["mlp_bias"] = bias
    shape = ModelConfig.from_hf(tiny_config(model_type, config))
    assert num_parameters(shape) == sum(prod(size) for size in parameter_shapes(shape).values())


@pytest.mark.parametrize(
    ("dtype", "moments"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")],
)
def test_static_parts_are_what_is_allocated(make_module, dtype, moments):
    module = make_module()
    weights = OwnedWeights(ModelConfig.from_hf(module.config), getattr(torch, dtype), torch.device("cpu"))
    model = Model(module.config, weights)
    optimizer = AdamW(weights.flat, (), 0, (0.9, 0.95), 1e-15, 0.01, getattr(torch, moments))
    told = plan_training(model.config, dtype, "cpu", GIB, replace(TINY_SIZES, moments=moments))
    state = [tensor for name, tensor in optimizer.state().items() if name != "num_steps"]
    assert plan.MOMENT_BLOCK == BLOCK
    assert gib(told, "weights") * GIB == weights.flat.nbytes
    assert gib(told, "gradients") * GIB == optimizer.grad.nbytes
    assert gib(told, "optimizer") * GIB == sum(x.nbytes for x in state)


def test_cache_is_what_the_engine_allocates(make_module):
    model = Model.from_hf(make_module())
    told = plan_inference(model.config, "float32", "cpu", GIB, Sizes(8, 8, 4, 2))
    told = replace(told, cache_bytes=10 * told.page_tokens * told.token_bytes)
    cache = engine.Engine(model, delimiter_id=3, eos_id=2, max_cache_bytes=told.cache_bytes).cache
    assert plan.PAGE_TOKENS == engine.PAGE_SIZE
    assert cache.k.nbytes + cache.v.nbytes == told.cache_bytes
    assert cache.num_pages == told.num_pages == 9


def test_copies_of_the_weights_are_counted():
    sizes = replace(SHORT, num_copies=2, num_fp32_copies=1)
    told = plan_training(LLAMA_3B, "bfloat16", "cuda", 139 * GIB, sizes, shrink=True)
    assert gib(told, "other weights") * GIB == (2 * 2 + 4) * num_parameters(LLAMA_3B)


def test_scoring_shares_the_memory_of_training():
    """Only what a scoring pass takes beyond a step's activations counts."""
    passes = plan.pass_bytes(LLAMA_3B, "bfloat16", "cuda", SHORT)
    told = plan_training(LLAMA_3B, "bfloat16", "cuda", 500 * GIB, TINY_SIZES)
    step = gib(told, "activations") + gib(told, "backward")
    assert gib(told, "passes") == pytest.approx(passes / GIB - step, abs=1e-6)
    assert "passes" not in str(plan_training(LLAMA_3B, "bfloat16", "cuda", 500 * GIB, SHORT))
    assert gib(plan_inference(LLAMA_3B, "bfloat16", "cuda", 79 * GIB, SHORT), "passes") == passes / GIB


def test_cpu_cache_is_a_fixed_budget():
    assert plan_inference(LLAMA_3B, "float32", "cpu", 64 * GIB, SHORT).cache_bytes == 2 * GIB
    shape = {"num_layers": 1, "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_heads": 8}
    small = SimpleNamespace(**vars(LLAMA_3B) | shape)
    assert plan_inference(small, "float32", "cpu", 3 * GIB, TINY_SIZES).cache_bytes == 3 * GIB // 2, "half of all"


# What autograd keeps


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at one time in tensors that operations made; ``known`` ones do not count."""

    def __init__(self, *known):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live += num_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key, num_bytes):
        self.seen.discard(key)
        self.live -= num_bytes


def packed_batch(vocab_size, num_prompts, num_generations, prompt, trace, answer):
    examples = [Example(p, [p] * prompt, [1] * answer, None, "", "", "") for p in range(num_prompts)]
    G, P = num_generations, num_prompts
    traces = Traces([[[5] * trace] * G] * P, [[[-1.0] * trace] * G] * P, [[-1.0] * G] * P)
    logprobs, advantage = [[torch.full((answer,), -1.0)] * G] * P, [torch.randn(G)] * P
    weights = [[torch.ones(answer)] * G] * P
    tokens = loss_tokens(
        examples, traces, logprobs, advantage, [True] * P, weights, Objective(), 1, 1.0, trace + answer
    )
    (batch,) = pack(tokens, 10**9, torch.device("cpu"))
    return batch


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "run"),
    [
        ({"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 512}, (4, 8, 32, 64, 16)),
        ({"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 1000,
          "num_attention_heads": 8, "tie_word_embeddings": True}, (1, 8, 64, 100, 30)),
        ({"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 300,
          "num_attention_heads": 8, "num_key_value_heads": 8}, (8, 4, 20, 30, 10)),
    ],
)  # fmt: skip
def test_activations_and_loss_are_what_a_step_takes(config, run, dtype, recompute):
    from conftest import TINY

    hf_config = tiny_config("llama", TINY | config)
    shape = ModelConfig.from_hf(hf_config)
    model = Model(hf_config, OwnedWeights(shape, getattr(torch, dtype), torch.device("cpu")))
    torch.nn.init.normal_(model.weights.flat, std=0.02)
    optimizer = AdamW(
        model.weights.flat, model.weights.leaves.values(), model.weights.num_matrix_elements, (0.9, 0.95), 1e-15, 0.01
    )
    batch = packed_batch(config["vocab_size"], *run)
    with PeakBytes(model.weights.flat, optimizer.grad) as measured:
        hidden_AD = train_step.loss_rows(model.packed(batch, recompute), batch)
        grad_head_VD = optimizer.gradient(model.head)
        *_, grad_AD = train_step._loss(hidden_AD, model.head, batch.loss, None, None, grad_head_VD, Objective(), 1.0)
        hidden_AD.backward(grad_AD)
    num_tokens, sizes = len(batch.tokens_T), Sizes(*run[2:], run[1], recompute=recompute)
    predicted = plan.training_bytes(shape, dtype, "cpu", num_tokens, sizes)
    # Of the loss's chunks of logits, which the C++ op keeps to itself, nothing is measured.
    assert 0.95 < predicted / measured.peak < 1.15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averaging_takes_a_slice_at_a_time(dtype, make_module, monkeypatch):
    config = make_module().config
    weights = OwnedWeights(ModelConfig.from_hf(config), getattr(torch, dtype), torch.device("cpu"))
    model = Model(config, weights)
    torch.nn.init.normal_(weights.flat)
    average = run.WeightAverage(model)
    torch.nn.init.normal_(weights.flat)
    expected = average.flat.lerp(weights.flat.float(), 1 - run.EMA_DECAY)
    monkeypatch.setattr(run, "AVERAGED_AT_ONCE", 1024)
    with PeakBytes(average.flat, average.model.weights.flat, weights.flat) as measured:
        average.update(weights.flat)
    assert torch.equal(average.flat, expected)
    assert torch.equal(average.model.weights.flat, expected.to(weights.flat.dtype))
    assert measured.peak <= 4 * 1024 < weights.flat.nbytes // 4


# What is refused


def test_weights_that_do_not_fit():
    with pytest.raises(UserError, match=r"cuda has 79\.00 GiB of memory; weights 14\.96 \+ .* are 93\.\d\d, so 0\.00"):
        plan_training(LLAMA_8B, "bfloat16", "cuda", 79 * GIB, SHORT)


def test_a_micro_batch_that_does_not_fit_names_one_that_does():
    sizes = replace(SHORT, recompute="none")
    told = r"activations 1\d\d\.\d+ .* max_tokens_per_batch of at most [\d,]+ fits"
    with pytest.raises(UserError, match=told) as error:
        plan_training(LLAMA_8B, "bfloat16", "cuda", 139 * GIB, sizes)
    most = int(str(error.value).split("at most ")[1].split(" ")[0].replace(",", ""))
    assert plan_training(LLAMA_8B, "bfloat16", "cuda", 139 * GIB, replace(sizes, batch_tokens=most)).num_slots >= 8
    with pytest.raises(UserError):
        plan_training(LLAMA_8B, "bfloat16", "cuda", 139 * GIB, replace(sizes, batch_tokens=most + 512))


def test_what_is_recomputed_is_what_the_memory_asks_for():
    def chosen(gib, **sizes):
        told = plan_training(LLAMA_3B, "bfloat16", "cuda", gib * GIB, replace(SHORT, **sizes), shrink=True)
        return told.sizes.recompute

    assert [chosen(gib) for gib in (70, 79, 200)] == ["full", "selective", "none"]
    assert chosen(70, recompute="selective") == "selective", "what is told stays"
    in_order = [
        plan.activation_bytes(LLAMA_3B, "bfloat16", "cuda", 8192, replace(SHORT, recompute=recompute))
        for recompute in ("full", "selective", "none")
    ]
    assert in_order == sorted(in_order)
    assert in_order[0] == 8192 * 2 * 3072 * (28 + 2), "a layer's input, and the last hidden states with their norm"


def test_a_group_that_does_not_fit():
    with pytest.raises(UserError, match=r"one group of a prompt of 4,096 and 64 traces of 20,000 \+ 8,000 tokens"):
        plan_inference(LLAMA_8B, "bfloat16", "cuda", 79 * GIB, Sizes(4096, 20000, 8000, 64))


def test_a_derived_micro_batch_leaves_half_for_the_cache():
    told = plan_training(LLAMA_3B, "bfloat16", "cuda", 70 * GIB, SHORT, shrink=True)
    assert told.sizes.batch_tokens == SHORT.batch_tokens
    assert told.sizes.recompute == "full"
    kept = plan_training(LLAMA_3B, "bfloat16", "cuda", 70 * GIB, replace(SHORT, recompute="none"), shrink=True)
    assert 1312 <= kept.sizes.batch_tokens < SHORT.batch_tokens
    for plan_ in (told, kept):
        assert plan_.cache_bytes >= (gib(plan_, "activations") + gib(plan_, "backward")) * GIB
    assert plan_training(LLAMA_3B, "bfloat16", "cuda", 500 * GIB, SHORT, shrink=True).sizes == replace(
        SHORT, recompute="none", moments="float32"
    )


# The command


def estimate(capsys, *argv):
    code = cli.main(["estimate", *argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_estimate_needs_no_weights_and_no_device(capsys, llama_folder):
    out = estimate(
        capsys, "--model_name_or_path", str(llama_folder("8b")), "--device", "cuda", "--device_memory_gib", "139",
        "--max_prompt_length=512", "--max_trace_length=600", "--max_answer_length=200", "--adam_moments_dtype=bfloat16",
    )  # fmt: skip
    assert "memory of cuda: 139.00 GiB" in out
    assert "  weights              14.96  8,030,261,248 parameters in bfloat16" in out
    assert "  optimizer            44.87  bf16 moments, 16-bit remainders of fp32 weights" in out
    assert "pages of 256 tokens, 128 KiB a token" in out


def test_estimate_of_the_default(capsys):
    out = estimate(capsys)
    assert "memory of " in out and "slots x 56 tokens after prompts of 64" in out
    told = "a step of 16 prompts x 8 traces: at most 5,120 tokens sampled and 8,320 trained"
    assert told in out
    assert "a step of 16 prompts: at most 0 tokens sampled and 1,296 trained" in estimate(capsys, "--objective", "sft")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device_memory_gib", "0"], "device_memory_gib is 0.0; it should be above 0"),
        (["--device_memory_gib", "0.001"], "cpu has 0.0010 GiB of memory; weights 0.0025 + "),
        (["--model_name_or_path", "./nowhere"], "model ./nowhere: no such folder"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--memory", "3"], "unknown option --memory"),
        (["--num_generations", "1"], "num_generations is 1; an advantage compares at least 2 traces"),
        (["--adam_moments_dtype", "int8"], "adam_moments_dtype int8 is for CUDA; on a CPU the moments are fp32"),
        (["--max_trace_length", "5000"], "max_trace_length 5000 + 1 delimiter do not fit"),
    ],
)
def test_estimate_refuses_in_one_line(capsys, argv, message):
    argv = ["--device_memory_gib=8", "--device=cpu", *argv] if "--device" not in argv else argv
    assert cli.main(["estimate", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nrt-fast: error: ") and err.count("\n") == 1
    assert message in err


def test_train_prints_the_plan_first(capsys, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "from_pretrained", lambda *args: pytest.fail("weights were read before it"))
    with pytest.raises(pytest.fail.Exception):
        from nrt_fast import loop

        loop.train(tiny_run(tmp_path / "run"))
    assert capsys.readouterr().out.startswith("memory of cpu: ")
