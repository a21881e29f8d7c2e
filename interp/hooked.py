"""TransformerLens' views of a loaded model, offline: the TransformerBridge and the classic HookedTransformer."""

from __future__ import annotations

import copy
import tempfile
from typing import TYPE_CHECKING, Any

from interp import InterpError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from interp.models import Subject

#: Largest relative difference of the logits. bfloat16 stays below .03; a wrong rotary embedding is above 1.
TOLERANCE = 0.1


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weight tensors (about 1 MB of its own)."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def bridge(subject: Subject) -> TransformerBridge:
    """A TransformerBridge over a twin of `subject`'s model, which stays as it is (the bridge rewires its own).

    Raises InterpError for an architecture that it does not know, or for which it computes something else.
    """
    from transformer_lens.model_bridge import TransformerBridge

    model = twin(subject.model)
    model.config.architectures = [type(model).__name__]  # absent in a model that was made in memory
    try:
        view = TransformerBridge.boot_transformers(
            "local",
            hf_model=model,
            tokenizer=_tokenizer(subject),
            device=str(subject.device),
            dtype=subject.dtype,
        )
    except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
        raise InterpError(
            f"TransformerBridge does not know {type(model).__name__} ({_first_line(error)});"
            " site `resid` works without it"
        ) from error
    _check_agreement(subject, view, "TransformerBridge")
    return view


def hooked_transformer(subject: Subject) -> HookedTransformer:
    """A HookedTransformer with `subject`'s weights, unprocessed (no folding, no centring).

    The configuration is read from a temporary folder because transformer-lens 3.9 knows no local one and would ask
    the Hub; it matches names in the path ("llama", "gemma"), which this folder's avoids.
    Raises InterpError for an architecture that HookedTransformer does not know, or computes otherwise.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    model, tokenizer = subject.model, _tokenizer(subject)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    side = "left" if tokenizer.padding_side == "left" else "right"
    try:
        with tempfile.TemporaryDirectory(prefix="hooked-") as folder:
            config.save_pretrained(folder)
            cfg = loading.get_pretrained_model_config(
                folder,
                hf_cfg=config.to_dict(),
                dtype=subject.dtype,
                device=str(subject.device),
                default_prepend_bos=False,
            )
            state = loading.get_pretrained_state_dict(folder, cfg, model, dtype=subject.dtype)
        hooked = HookedTransformer(cfg, tokenizer, move_to_device=False, default_padding_side=side)
        # At once: load_and_process_state_dict, with every process off, does the same key by key, in 13 s for 135M.
        hooked.load_state_dict(hooked.fill_missing_keys(state), strict=False)
    # RuntimeError: a shape that it does not expect, as a Llama's whose head_dim is not hidden / heads.
    except (NotImplementedError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise InterpError(
            f"HookedTransformer does not know this {type(model).__name__} ({_first_line(error)});"
            " Subject.bridge serves it"
        ) from error
    hooked = hooked.to(subject.device, print_details=False)
    _check_agreement(subject, hooked, "HookedTransformer")
    return hooked


def _tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that TransformerLens takes as it is.

    It would read it once more from its path or the Hub, to add a bos; here it is only ever given ids.
    """
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.init_kwargs = {"name_or_path": subject.name, **tokenizer.init_kwargs, "add_bos_token": True}
    return tokenizer


def _check_agreement(subject: Subject, view: Any, kind: str) -> None:
    """Compare logits on a few tokens: TransformerLens rebuilds the attention, and not every one as the model has it."""
    import torch

    vocabulary = int(subject.config.vocab_size)
    ids = torch.arange(1, 17, device=subject.device)[None] * (vocabulary // 17 or 1) % vocabulary
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        own = subject.model(ids, attention_mask=mask, use_cache=False).logits.float()
        theirs = view(ids, attention_mask=mask, return_type="logits").float()
    error = float((theirs - own).norm() / own.norm())
    if not error < TOLERANCE:
        raise InterpError(
            f"{kind} computes another {type(subject.model).__name__} than transformers (logits differ by {error:.0%});"
            " site `resid` works without it"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
