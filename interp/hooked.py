"""A classic HookedTransformer from a loaded model, offline (transformer-lens 3.9 knows no local folder)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from interp import InterpError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from interp.models import Subject


def hooked_transformer(subject: Subject) -> HookedTransformer:
    """A HookedTransformer with `subject`'s weights, unprocessed (no folding, no centring).

    The configuration is read from a temporary folder because transformer-lens would otherwise ask the Hub,
    and matches names in its path ("llama", "gemma"), so the folder's name avoids them.
    Raises InterpError for an architecture that HookedTransformer does not know.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    model, tokenizer = subject.model, subject.tokenizer
    config = model.config
    config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory(prefix="hooked-") as folder:
        config.save_pretrained(folder)
        path = str(Path(folder))
        try:
            cfg = loading.get_pretrained_model_config(
                path, hf_cfg=config.to_dict(), dtype=subject.dtype, device=str(subject.device), default_prepend_bos=False
            )
            state = loading.get_pretrained_state_dict(path, cfg, model, dtype=subject.dtype)
        except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
            raise InterpError(
                f"HookedTransformer does not know {type(model).__name__} ({error}); Subject.bridge serves it"
            ) from error
    hooked = HookedTransformer(
        cfg, tokenizer, move_to_device=False, default_padding_side=tokenizer.padding_side
    )
    hooked.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return hooked.to(subject.device)
