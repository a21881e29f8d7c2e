"""One forward pass over a batch of conversations, with hooks that keep positions, not tokens.

Each distinct prompt passes through the model once and its completions continue from its key-value cache, so
every token of a rated set (four completions a prompt) is computed once. Prompts are padded on the left and
completions on the right: a row's real tokens stay contiguous, which sliding-window attention needs, and the
attention mask is always given. Models that keep a running state instead of keys and values read whole rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import InterpError
from interp import positions as pos

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedTokenizerBase

    from interp.chat import Encoded
    from interp.models import Subject

#: Hook points with their TransformerLens names. `resid` hangs on the model's own blocks, the others on the bridge.
SITES = {
    "resid": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}

#: Tokens unembedded at once for the surprise: bounds the logits at 256 x d_vocab.
LOGIT_ROWS = 256


def hook_name(site: str, layer: int, n_layers: int) -> str:
    """TransformerLens' name of a site and layer; `resid` at `n_layers` is what leaves the last block."""
    if site == "resid" and layer == n_layers:
        return f"blocks.{n_layers - 1}.hook_resid_post"
    return f"blocks.{layer}.{SITES[site]}"


@contextmanager
def residual_hooks(subject: Subject, layers: Sequence[int], sink: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `sink(layer, hidden)` for the stream entering each block of `layers`, and leaving the last block."""
    handles = []

    def entering(layer: int) -> Callable[..., None]:
        return lambda _module, args, kwargs: sink(layer, args[0] if args else kwargs["hidden_states"])

    def leaving(layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: sink(layer, output[0] if isinstance(output, tuple) else output)

    try:
        for layer in layers:
            if layer < subject.n_layers:
                handle = subject.blocks[layer].register_forward_pre_hook(entering(layer), with_kwargs=True)
            else:
                handle = subject.blocks[-1].register_forward_hook(leaving(layer))
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Stage:
    """One forward call: `rows` of the shard are served by sequences `owner` of the call.

    `mask[i]` marks, in the call's padded token axis, the tokens that are tokens `low[i]:high[i]` of row `rows[i]`.
    """

    rows: Tensor  # [row]
    owner: Tensor  # [row]
    mask: Tensor  # [row, token] bool
    parts: tuple[tuple[int, int], ...]  # [row] of (low, high)


class PositionSink:
    """Sums weights x tokens into `values` [layer, position, row, d_model], float32."""

    def __init__(self, rows: Sequence[Encoded], layers: Sequence[int], names: Sequence[str], like: Subject) -> None:
        import torch

        self.index = {layer: i for i, layer in enumerate(layers)}
        width = max(row.length for row in rows)
        self.weights = torch.from_numpy(pos.weights(rows, names, width))
        self.values = torch.zeros(len(layers), len(names), len(rows), like.d_model, device=like.device)

    def begin(self, stage: Stage) -> None:
        import torch

        device = self.values.device
        placed = torch.zeros(len(stage.parts), self.weights.shape[1], stage.mask.shape[1])
        for i, (row, (low, high)) in enumerate(zip(stage.rows.tolist(), stage.parts, strict=True)):
            placed[i, :, stage.mask[i]] = self.weights[row, :, low:high]
        # Positions without any weight in this stage (a prompt's tokens serve one of sixteen) cost nothing.
        self.columns = placed.any(-1).any(0).nonzero()[:, 0].to(device)
        self.placed = placed.to(device)[:, self.columns]
        self.rows, self.owner = stage.rows.to(device), stage.owner.to(device)
        self.direct = torch.equal(stage.owner, torch.arange(len(stage.owner)))

    def __call__(self, layer: int, hidden: Float[Tensor, "sequence token d_model"]) -> None:
        if not len(self.columns):
            return
        served = hidden if self.direct else hidden[self.owner]
        pooled = (self.placed @ served.float()).transpose(0, 1)
        cell = self.values[self.index[layer]]
        cell[self.columns[:, None], self.rows] += pooled


class TokenSink:
    """Keeps every token: `values` [layer, token, d_model], the rows' tokens one after another."""

    def __init__(self, rows: Sequence[Encoded], layers: Sequence[int], like: Subject) -> None:
        import torch

        self.index = {layer: i for i, layer in enumerate(layers)}
        self.offsets = np.cumsum([0, *(row.length for row in rows)])
        self.values = torch.zeros(len(layers), int(self.offsets[-1]), like.d_model, device=like.device)

    def begin(self, stage: Stage) -> None:
        import torch

        starts = self.offsets[stage.rows.tolist()].tolist()
        spans = [torch.arange(s + low, s + high) for s, (low, high) in zip(starts, stage.parts, strict=True)]
        self.target = torch.cat(spans).to(self.values.device)
        self.owner, self.mask = stage.owner.to(self.values.device), stage.mask.to(self.values.device)

    def __call__(self, layer: int, hidden: Float[Tensor, "sequence token d_model"]) -> None:
        self.values[self.index[layer], self.target] = hidden[self.owner][self.mask].float()


class Surprise:
    """Log-probabilities of the completions' tokens: `values` [row, 3] = mean, minimum, last token (nats)."""

    def __init__(self, rows: Sequence[Encoded], subject: Subject) -> None:
        self.subject = subject
        self.rows = rows
        self.found: list[list[Tensor]] = [[] for _ in rows]

    def __call__(self, stage: Stage, hidden: Float[Tensor, "sequence token d_model"]) -> None:
        """Read the last hidden states (after the final norm) of one forward call."""
        import torch

        states, targets, lengths = [], [], []
        for i, (row, (low, high)) in enumerate(zip(stage.rows.tolist(), stage.parts, strict=True)):
            encoded = self.rows[row]
            # Token t is predicted at t - 1: the prompt's last state serves the completion's first token.
            first, last = max(low, encoded.start - 1), min(high, encoded.stop - 1)
            tokens = hidden[stage.owner[i]][stage.mask[i].to(hidden.device)]
            states.append(tokens[first - low : last - low])
            targets += encoded.ids[first + 1 : last + 1]
            lengths.append(last - first)
        flat, wanted = torch.cat(states), torch.tensor(targets, device=hidden.device)
        parts = []
        for state, token in zip(flat.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
            logits = self.subject.logits(state).float()
            parts.append(logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1))
        for row, part in zip(stage.rows.tolist(), torch.cat(parts).cpu().split(lengths), strict=True):
            self.found[row].append(part)

    @property
    def values(self) -> Float[Tensor, "row 3"]:
        import torch

        rows = [torch.cat(parts) for parts in self.found]
        return torch.stack([torch.stack([r.mean(), r.min(), r[-1]]) for r in rows])


def pad(
    sequences: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, side: str
) -> tuple[Int[Tensor, "sequence token"], Int[Tensor, "sequence token"]]:
    """(ids, mask), padded on `side`; the padding's id does not matter, since it is masked."""
    import torch

    fill = tokenizer.pad_token_id
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), fill if isinstance(fill, int) else 0)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[i, place] = torch.tensor(sequence)
        mask[i, place] = 1
    return ids, mask


def prompt_groups(rows: Sequence[Encoded]) -> dict[tuple[int, ...], list[int]]:
    """Row numbers by the tokens before their completion, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.ids[: row.start], []).append(index)
    return groups


def _select(cache: DynamicCache, owner: Tensor) -> DynamicCache:
    """The cache of the sequences `owner`, in that order; the given cache stays as it is."""
    import torch

    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    chosen = copy.deepcopy(cache, {id(t): t for t in tensors})
    chosen.batch_select_indices(owner)
    return chosen


def keeps_keys(subject: Subject) -> bool:
    """Whether every block keeps keys and values, so that completions can continue from their prompt's cache.

    State-space and linear-attention blocks keep a running state, into which left padding would enter.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    layers = DynamicCache(config=subject.config).layers
    return all(isinstance(x, DynamicLayer) and not isinstance(x, LinearAttentionCacheLayerMixin) for x in layers)


def run_shared(
    subject: Subject,
    rows: Sequence[Encoded],
    batches: Sequence[Sequence[int]],
    begin: Callable[[Stage], None] | None = None,
    after: Callable[[Stage, Tensor], None] | None = None,
) -> None:
    """Pass every token of `rows` through the model once: their distinct prompts, then batches of completions.

    `begin(stage)` is called before each forward call, `after(stage, last hidden states)` after it. `batches`
    partitions the row numbers. Call it under `torch.inference_mode()`.
    """
    import torch

    if not keeps_keys(subject):
        for stage, ids, mask in whole_rows(subject, rows, batches):
            if begin:
                begin(stage)
            out = subject.body(ids, attention_mask=mask, use_cache=False)
            if after:
                after(stage, out.last_hidden_state)
        return
    device = subject.device
    groups = prompt_groups(rows)
    owner = torch.empty(len(rows), dtype=torch.long)
    for number, members in enumerate(groups.values()):
        owner[members] = number
    ids, mask = pad(list(groups), subject.tokenizer, "left")
    ends = mask.sum(1)
    parts = tuple((0, row.start) for row in rows)
    stage = Stage(torch.arange(len(rows)), owner, mask[owner].bool(), parts)
    if begin:
        begin(stage)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = subject.body(ids.to(device), attention_mask=mask.to(device), position_ids=places.to(device), use_cache=True)
    if after:
        after(stage, out.last_hidden_state)
    for batch in batches:
        chosen = torch.tensor(list(batch))
        ids, own = pad([rows[i].ids[rows[i].start :] for i in batch], subject.tokenizer, "right")
        whole = torch.cat([mask[owner[chosen]], own], 1)
        places = ends[owner[chosen], None] + torch.arange(ids.shape[1])
        parts = tuple((rows[i].start, rows[i].length) for i in batch)
        stage = Stage(chosen, torch.arange(len(batch)), own.bool(), parts)
        if begin:
            begin(stage)
        continued = subject.body(
            ids.to(device),
            attention_mask=whole.to(device),
            position_ids=places.to(device),
            past_key_values=_select(out.past_key_values, owner[chosen].to(device)),
            use_cache=True,
        )
        if after:
            after(stage, continued.last_hidden_state)


def whole_rows(
    subject: Subject, rows: Sequence[Encoded], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[Stage, Int[Tensor, "sequence token"], Int[Tensor, "sequence token"]]]:
    """(stage, ids, mask) of each batch, prompts and completions together, padded on the right."""
    import torch

    for batch in batches:
        ids, mask = pad([rows[i].ids for i in batch], subject.tokenizer, "right")
        parts = tuple((0, rows[i].length) for i in batch)
        stage = Stage(torch.tensor(list(batch)), torch.arange(len(batch)), mask.bool(), parts)
        yield stage, ids.to(subject.device), mask.to(subject.device)


def run_bridge(
    subject: Subject,
    rows: Sequence[Encoded],
    batches: Sequence[Sequence[int]],
    names: dict[str, int],
    sink: PositionSink | TokenSink,
) -> None:
    """Collect TransformerLens hook points (`names`: hook name -> layer) through the bridge, whole rows at a time."""
    silent = dict(names)

    def reading(name: str, layer: int) -> Callable[..., None]:
        def read(value: Tensor, hook: Any) -> None:
            silent.pop(name, None)
            sink(layer, value)

        return read

    hooks = [(name, reading(name, layer)) for name, layer in names.items()]
    for stage, ids, mask in whole_rows(subject, rows, batches):
        sink.begin(stage)
        with subject.bridge.hooks(fwd_hooks=hooks):
            subject.bridge(ids, attention_mask=mask, return_type=None)
        if silent:
            raise InterpError(f"{subject.name} has no {next(iter(silent))}: its blocks are built otherwise")


def private_copy(subject: Subject) -> Subject:
    """The same weights under modules of their own: a worker's hooks and caches touch nobody else's."""
    from interp.hooked import twin

    return replace(subject, model=twin(subject.model))
