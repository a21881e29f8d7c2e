"""Tiny seeded tokenizers, chat templates and models for the tests: no network, milliseconds each."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from interp.chat import messages_of
from interp.models import Subject, wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interp.chat import Encoded

CORPUS = [
    "What is the capital of France? The capital of France is Paris, and it lies on the Seine.",
    "Write a short story about a dog. Once upon a time there was a dog who liked to swim.",
    "User: Assistant: system user assistant model think You are a helpful assistant.",
    "Explain how rain forms; water evaporates, rises, cools and falls. 1 2 3 4 5 6 7 8 9 0",
]
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>"),
    *("<think>", "</think>"),
]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
#: Like Qwen3's: an empty block of thought goes into the last assistant turn, and thoughts are cut from earlier ones.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set said = m['content'].split('</think>')[-1].lstrip('\n') if '</think>' in m['content'] else m['content'] %}"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ said }}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "plain": None,
}
#: The text of the end-of-turn token by template.
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "llama2": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "plain": "</s>",
}


def _byte_level(normalizer: Any = None) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def _metaspace() -> Tokenizer:
    """As SentencePiece models (Llama 2, Mistral) have it: `▁` for spaces and bytes for what is unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=480, special_tokens=names, show_progress=False))
    return made


KINDS = {
    "bytes": _byte_level,
    "nfc": lambda: _byte_level(normalizers.NFC()),
    "metaspace": _metaspace,
}


@cache
def _trained(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer(
    template: str = "chatml", kind: str = "bytes", adds_bos: bool = False, **names: str
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the chat template of this name (or text); `adds_bos` as Llama's do to plain text."""
    made = Tokenizer.from_str(_trained(kind))
    if adds_bos:
        bos = made.token_to_id("<s>")
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **names}
    out = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    out.add_special_tokens({"additional_special_tokens": [s for s in SPECIAL if s not in names.values()]})
    out.chat_template = TEMPLATES.get(template, template)
    return out


WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 512}
#: Architecture -> (configuration class, model class, settings beside the common ones).
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": 3, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral": (
        *("MistralConfig", "MistralForCausalLM"),
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": None},
    ),
    "gemma3": (
        *("Gemma3TextConfig", "Gemma3ForCausalLM"),
        # One full and two local layers; the window is far shorter than the conversations.
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"num_hidden_layers": 2, "num_key_value_heads": 4, "resid_pdrop": 0.0}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"num_hidden_layers": 4, "num_key_value_heads": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 512}),
    # Not in the list that is promised, but their unembedding is scaled or capped.
    "gemma2": (
        *("Gemma2Config", "Gemma2ForCausalLM"),
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "granite": (
        *("GraniteConfig", "GraniteForCausalLM"),
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    ),
    "cohere": (
        "CohereConfig",
        "CohereForCausalLM",
        {"num_hidden_layers": 2, "num_key_value_heads": 4, "logit_scale": 0.25},
    ),
}


def model(architecture: str, tok: Any, seed: int = 0, **settings: Any) -> Any:
    """A random model whose weights are large enough for attention and layers to differ visibly."""
    config_class, model_class, own = ARCHITECTURES[architecture]
    wide = {} if architecture == "gpt2" else WIDTH
    ids = {"pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    config = getattr(transformers, config_class)(vocab_size=len(tok), **ids, **{**wide, **own, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, model_class)(config)
        for name, parameter in made.named_parameters():
            # The stock initialisation (std .02) leaves attention uniform and the stream the embedding.
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
            elif "norm" in name or "ln_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def subject(architecture: str = "llama", tok: Any = None, seed: int = 0, **settings: Any) -> Subject:
    """A Subject around `model(...)`."""
    tok = tok or tokenizer()
    return wrap(model(architecture, tok, seed, **settings), tok, architecture)


def conversations(seed: int = 0) -> list[list[dict[str, str]]]:
    """Four prompts of 1 to about 60 words with 1 to 4 completions of 1 to about 60 words, and one with a past."""
    words = " ".join(CORPUS).split()
    generator = torch.Generator().manual_seed(seed)

    def say(count: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (count,), generator=generator))

    out = []
    for prompt, completions in ((1, (1, 3)), (60, (2, 60, 7)), (9, (5,)), (14, (30, 1, 2, 12))):
        text = say(prompt)
        out += [messages_of(text, say(count)) for count in completions]
    past = [
        {"role": "user", "content": say(4)},
        {"role": "assistant", "content": say(3)},
        {"role": "user", "content": say(2)},
    ]
    return [*out[1::2], messages_of("", say(6), past), *out[::2]]


def hidden_states(subject: Subject, ids: Sequence[int]) -> torch.Tensor:
    """[layer, token, d_model] of one conversation by the plain model: the independent reference.

    transformers' own `hidden_states`, except the last, which it gives after the final norm: a hook on the last block.
    """
    kept = []
    handle = subject.blocks[-1].register_forward_hook(
        lambda _module, _args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.inference_mode():
            out = subject.model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    finally:
        handle.remove()
    return torch.stack([*out.hidden_states[:-1], kept[0]])[:, 0]


def pooled(states: torch.Tensor, row: Encoded, name: str) -> torch.Tensor:
    """[layer, d_model]: mean over the tokens of a position, found by a loop that shares no code with `interp`."""
    inside = list(range(row.start, row.stop))
    n = len(inside)
    chosen = {
        "prompt_end": lambda: [row.start - 1],
        "first": lambda: inside[:1],
        "last": lambda: inside[-1:],
        "turn_end": lambda: [row.turn_end],
        "end": lambda: [len(row.ids) - 1],
        "mean": lambda: inside,
    }
    if name in chosen:
        tokens = chosen[name]()
    elif name.startswith("d") and name[1:].isdigit():
        k = int(name[1:])
        # Token i of n lies in tenth k when k-1 <= 10 i / n < k, give or take a tenth that would be empty.
        low = (k - 1) * n // 10
        tokens = [t for i, t in enumerate(inside) if low <= i < max(low + 1, (k * n) // 10)]
    else:
        tokens = [inside[int(name)]]
    total = torch.zeros_like(states[:, 0])
    for t in tokens:
        total = total + states[:, t]
    return total / len(tokens)
