"""What the engine is timed against, transformers on the same live module, and the modules.

Weights are random. Traces end as a bench needs: coordinate 0 of every embedding is 1 and nothing writes to it later;
EOS and the delimiter are read from it alone, so their logits are a constant over the norm of the hidden state.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from nrt_fast import Engine, Model

SHAPES = {  # hidden, layers, vocabulary; rounds
    "128-4-512": ((128, 4, 512), 5),
    "256-6-4096": ((256, 6, 4096), 3),
    "512-8-32000": ((512, 8, 32_000), 2),
}
P, G, PROMPT, NEW = 8, 8, 32, 64  # prompts, traces each, ids of a prompt and of a trace
DTYPES = [torch.float32, torch.bfloat16]
EOS, DELIMITER = 1, 2
NEVER = -1e4  # such a logit is never drawn
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02}  # of a log-prob: the largest difference; in bf16 the mean one
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_3B = LLAMA_8B | {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "tie_word_embeddings": True,
}  # fmt: skip


def small_llama(hidden: int, layers: int, vocabulary: int) -> dict[str, object]:
    """Llama's proportions at a small width: 8/3 of it inside, half as many key as query heads."""
    heads = hidden // (64 if hidden >= 512 else 32)
    return {
        "hidden_size": hidden, "intermediate_size": 32 * round(hidden / 12), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip


@torch.no_grad()
def make_module(
    shape: dict[str, object], dtype: torch.dtype, device: str = "cpu", eos_probability: float = 0.0, context: int = 2048
) -> LlamaForCausalLM:
    """A random Llama whose logits spread by about 1; every token is EOS with this probability, never the delimiter."""
    config = LlamaConfig(max_position_embeddings=context, eos_token_id=None, bos_token_id=None, **shape)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            module = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    embed, head = module.model.embed_tokens.weight, module.lm_head.weight
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.normal_(generator=generator).mul_(parameter.shape[1] ** -0.5)
    if head is embed:  # a constant coordinate would move every logit alike, and EOS like any other
        return module
    embed.mul_(embed.shape[1] ** 0.5)[:, 0] = 1
    for layer in module.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    head[:, 0] = 0
    head[[EOS, DELIMITER]] = 0
    head[[EOS, DELIMITER], 0] = NEVER
    if eos_probability:
        head[EOS, 0] = _eos_weight(module, eos_probability)
    return module


def _eos_weight(module: LlamaForCausalLM, probability: float) -> float:
    """The weight that makes this the mean probability of EOS over the module's own texts, by bisection."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = generate(module, make_ids(module.config.vocab_size, 16, PROMPT).tolist(), 1, [48] * 16)()
    hidden = module.model(ids.clone()).last_hidden_state[:, PROMPT:].flatten(0, 1)
    others = (hidden @ module.lm_head.weight.T).float().logsumexp(-1)  # EOS is far below them still
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        mean = (hidden[:, 0].float() * middle - others).sigmoid().mean()
        low, high = (middle, high) if mean < probability else (low, middle)
    return low


def make_engine(module: LlamaForCausalLM, **options) -> Engine:
    return Engine(Model.from_hf(module), delimiter_id=DELIMITER, eos_id=EOS, **options)


def make_setting(
    shape: str, dtype: torch.dtype, device: str, eos_probability: float = 0.0
) -> tuple[LlamaForCausalLM, Engine, list[list[int]]]:
    """One of SHAPES: the module, an engine on its weights, prompts."""
    module = make_module(small_llama(*SHAPES[shape][0]), dtype, device, eos_probability, context=512)
    return module, make_engine(module), make_ids(module.config.vocab_size, P, PROMPT).tolist()


def make_ids(vocabulary: int, *shape: int, seed: int = 0) -> Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def is_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Log-probabilities of one model in this dtype, computed twice; see TOLERANCE."""
    error = (ours.cpu().float() - theirs.cpu().float()).abs()
    return float(error.max() if dtype == torch.float32 else error.mean()) < TOLERANCE[dtype]


class StopAt(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths_N: Tensor):
        self.lengths_N = lengths_N

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return self.lengths_N <= input_ids.shape[1]


def generate(
    module: LlamaForCausalLM, prompts: list[list[int]], num_generations: int, lengths: list[int], static: bool = False
) -> Callable[[], Tensor]:
    """transformers' ``generate`` over prompts of one length, each repeated; row i ends after ``lengths[i]`` ids.

    Returns:
        A call that returns all ids, [P G, prompt + longest].
    """
    ids = torch.tensor(prompts, device=module.device).repeat_interleave(num_generations, dim=0)
    options = {
        "attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0,
        "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": max(lengths),
    }  # fmt: skip
    if min(lengths) < max(lengths):
        stop = StopAt(torch.tensor(lengths, device=ids.device) + ids.shape[1])
        options["stopping_criteria"] = StoppingCriteriaList([stop])
    if static:
        options["cache_implementation"] = "static"
    return functools.partial(torch.inference_mode()(module.generate), ids, **options)


def reforward(
    module: LlamaForCausalLM, sequences: list[list[int]], num_scored: int, rows: int, all_logits: bool = False
) -> Callable[[], Tensor]:
    """Log-probabilities of the last ``num_scored`` ids of sequences, [N, num_scored], by forwarding all of them again.

    Neighbours of one length make batches of up to ``rows``, so that nothing is padded. With ``all_logits`` the head and
    the log-softmax run at every position, as the plain expression has it; else at those that are scored.
    """
    batches: list[list[list[int]]] = []
    for ids in sequences:
        if not batches or len(batches[-1]) == rows or len(batches[-1][0]) != len(ids):
            batches.append([])
        batches[-1].append(ids)
    inputs = [torch.tensor(batch, device=module.device) for batch in batches]

    @torch.inference_mode()
    def score(ids: Tensor) -> Tensor:
        logits = module(ids[:, :-1], use_cache=False, logits_to_keep=0 if all_logits else num_scored).logits
        targets = ids[:, -logits.shape[1] :]
        return logits.float().log_softmax(-1).gather(2, targets[..., None]).squeeze(2)[:, -num_scored:]

    return lambda: torch.cat([score(ids) for ids in inputs])
