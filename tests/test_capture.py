"""One forward pass with hooks: what it keeps equals the plain model and TransformerLens, token for token.

Tolerances are relative L2 norms per token: residual values span four orders of magnitude, so absolute ones mean
nothing. In float32 the same sums in another order (padding, a cache, other matrix shapes) differ by some 1e-6 on
these models; 2e-5 leaves room for other processors, and a wrong mask, position or layer is off by 1e-1 and more.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import InterpError, capture
from interp.capture import (
    SITES,
    PositionSink,
    Surprise,
    TokenSink,
    hook_name,
    keeps_keys,
    pad,
    private_copy,
    prompt_groups,
    residual_hooks,
    run_bridge,
    run_shared,
)
from interp.chat import Encoded, Encoder
from interp.models import wrap
from interp.positions import POSITIONS

CLOSE = 2e-5
PROMISED = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "gpt2"]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 difference over the last axis."""
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def rows():
    """Conversations with shared and unshared prompts, of 31 to 267 tokens."""
    encoded, _, skipped = Encoder(tiny.tokenizer()).encode_all(tiny.conversations())
    assert not skipped
    return encoded


@pytest.fixture(scope="module")
def subjects():
    """Each architecture once."""
    made = {}

    def get(architecture: str):
        if architecture not in made:
            made[architecture] = tiny.subject(architecture)
        return made[architecture]

    return get


def tokens_of(subject, rows, batches=None):
    """[layer, token, d_model] of every row, by run_shared, one row after another."""
    layers = range(subject.n_layers + 1)
    sink = TokenSink(rows, layers, subject)
    with torch.inference_mode(), residual_hooks(subject, layers, sink):
        run_shared(subject, rows, batches or [list(range(len(rows)))], sink.begin)
    return torch.split(sink.values, [row.length for row in rows], dim=1)


class TestResidualStream:
    """Every layer and token, by one shared pass."""

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_matches_plain_transformers(self, subjects, rows, architecture):
        """Padded, batched, continued from a cache: the same as one unpadded row at a time, to the last block."""
        subject = subjects(architecture)
        for row, found in zip(rows, tokens_of(subject, rows), strict=True):
            assert apart(found, tiny.hidden_states(subject, row.ids)) < CLOSE

    @pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
    def test_batched_equals_one_by_one(self, subjects, rows, architecture):
        """However the rows are divided among batches."""
        subject = subjects(architecture)
        alone = [tokens_of(subject, [row])[0] for row in rows]
        for batches in ([[i] for i in range(len(rows))], [[10, 0, 3], [1], [9, 8, 7, 6, 5, 4, 2]]):
            for found, expected in zip(tokens_of(subject, rows, batches), alone, strict=True):
                assert apart(found, expected) < CLOSE

    @pytest.mark.parametrize("architecture", PROMISED)
    def test_left_padded_equals_right_padded_equals_unpadded(self, subjects, rows, architecture):
        """What our padding means, on the plain model: masked, with the positions that the tokens have unpadded."""
        subject = subjects(architecture)
        some = [rows[0], rows[2], rows[9]]
        for side in ("left", "right"):
            ids, mask = pad([row.ids for row in some], subject.tokenizer, side)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                out = subject.model(ids, attention_mask=mask, position_ids=places, output_hidden_states=True)
            for i, row in enumerate(some):
                found = torch.stack(out.hidden_states[:-1])[:, i][:, mask[i].bool()]
                assert apart(found, tiny.hidden_states(subject, row.ids)[:-1]) < CLOSE

    def test_without_a_mask_padding_is_wrong(self, subjects, rows):
        """The control of the test above: left padding that is not masked changes the stream by more than a half."""
        subject = subjects("llama")
        ids, mask = pad([rows[0].ids, rows[1].ids], subject.tokenizer, "left")
        with torch.inference_mode():
            out = subject.model(ids, output_hidden_states=True)
        found = torch.stack(out.hidden_states[:-1])[:, 0][:, mask[0].bool()]
        assert apart(found, tiny.hidden_states(subject, rows[0].ids)[:-1]) > 0.5

    def test_sliding_window_is_shorter_than_the_rows(self, subjects, rows):
        """The control of Gemma 3's rows above: with a window over the whole row the stream is another one."""
        subject = subjects("gemma3")
        assert subject.config.sliding_window < min(row.length for row in rows)
        wide = tiny.subject("gemma3", sliding_window=512)
        assert apart(tiny.hidden_states(wide, rows[1].ids), tiny.hidden_states(subject, rows[1].ids)) > 0.01

    def test_last_layer_is_before_the_final_norm(self, subjects, rows):
        """transformers' last entry is after it: the two differ, by exactly that norm."""
        subject = subjects("llama")
        found = tokens_of(subject, [rows[0]])[0][-1]
        with torch.inference_mode():
            normed = subject.body(torch.tensor([rows[0].ids])).last_hidden_state[0]
            assert apart(subject.body.norm(found), normed) < CLOSE
        assert apart(found, normed) > 0.5

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma3", "gpt2"])
    def test_matches_transformer_bridge(self, subjects, rows, architecture):
        """Under the hook names that `hook_name` gives."""
        subject = subjects(architecture)
        layers = range(subject.n_layers + 1)
        _, cache = subject.run_with_cache(rows[2])
        expected = torch.stack([cache[hook_name("resid", layer, subject.n_layers)][0] for layer in layers])
        assert apart(tokens_of(subject, rows)[2], expected) < CLOSE

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
    def test_matches_hooked_transformer(self, subjects, rows, architecture):
        """The classic one, and its logits."""
        subject = subjects(architecture)
        ids = torch.tensor([rows[2].ids])
        with torch.inference_mode():
            logits, cache = subject.hooked_transformer().run_with_cache(ids, attention_mask=torch.ones_like(ids))
            expected = [cache[hook_name("resid", layer, subject.n_layers)][0] for layer in range(subject.n_layers + 1)]
            assert apart(logits, subject.model(ids).logits) < CLOSE
        assert apart(tokens_of(subject, rows)[2], torch.stack(expected)) < CLOSE

    @pytest.mark.parametrize(
        ("model_class", "config"),
        [
            (
                transformers.Qwen3NextForCausalLM,
                lambda **shared: transformers.Qwen3NextConfig(
                    **{**shared, "num_hidden_layers": 4},
                    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
                    **{"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
                    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
                ),
            ),
            (transformers.Lfm2ForCausalLM, lambda **shared: transformers.Lfm2Config(**shared, full_attn_idxs=[1])),
        ],
        ids=["qwen3-next", "lfm2"],
    )
    def test_running_states_are_read_in_whole_rows(self, rows, model_class, config):
        """Linear attention and convolutions keep no keys to continue from, and left padding would enter their state."""
        tok = tiny.tokenizer()
        shared = {**tiny.WIDTH, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": len(tok)}
        torch.manual_seed(0)
        subject = wrap(model_class(config(**shared, pad_token_id=tok.pad_token_id)), tok)
        assert not keeps_keys(subject)
        for row, found in zip(rows, tokens_of(subject, rows), strict=True):
            # Qwen3-Next sums in chunks whose borders move with the padding.
            assert apart(found, tiny.hidden_states(subject, row.ids)) < 1e-4

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_attention_continues_from_its_keys(self, subjects, architecture):
        """The control: all of these share their prompts."""
        assert keeps_keys(subjects(architecture))

    def test_every_token_passes_once(self, subjects, rows):
        """Distinct prompts once, completions once: that is what sharing is for."""
        subject = subjects("llama")
        seen = []
        handle = subject.blocks[0].register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].shape[:2].numel())
        )
        try:
            with torch.inference_mode():
                run_shared(subject, rows, [[i] for i in range(len(rows))])
        finally:
            handle.remove()
        prompts = list(prompt_groups(rows))
        assert len(prompts) == 5
        padded = len(prompts) * max(map(len, prompts))
        assert sum(seen) == padded + sum(row.length - row.start for row in rows)


class TestPositions:
    """Weights times tokens, inside the hook."""

    @pytest.mark.parametrize("architecture", ["llama", "gemma3"])
    def test_pooled_positions_match_a_loop(self, subjects, rows, architecture):
        """Every layer, position and row."""
        subject = subjects(architecture)
        layers, names = range(subject.n_layers + 1), (*POSITIONS, "-1", "0")
        sink = PositionSink(rows, layers, names, subject)
        with torch.inference_mode(), residual_hooks(subject, layers, sink):
            run_shared(subject, rows, [[3, 1, 4], [0], [2, 10, 9, 8], [5, 6, 7]], sink.begin)
        for i, row in enumerate(rows):
            states = tiny.hidden_states(subject, row.ids)
            expected = torch.stack([tiny.pooled(states, row, name) for name in names], 1)
            assert apart(sink.values[:, :, i], expected) < CLOSE

    def test_some_layers_only(self, subjects, rows):
        """In the order asked for."""
        subject = subjects("llama")
        layers = [3, 1]
        sink = PositionSink(rows[:2], layers, ("mean",), subject)
        with torch.inference_mode(), residual_hooks(subject, layers, sink):
            run_shared(subject, rows[:2], [[0, 1]], sink.begin)
        expected = tiny.pooled(tiny.hidden_states(subject, rows[1].ids), rows[1], "mean")[layers]
        assert apart(sink.values[:, 0, 1], expected) < CLOSE


class TestSites:
    """Hook points beside the residual stream, through the bridge."""

    @pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_mid"])
    @pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
    def test_match_the_bridge_s_cache(self, subjects, rows, architecture, site):
        """The padded, batched and pooled run against one unpadded row in TransformerLens' own cache."""
        subject = subjects(architecture)
        names = {hook_name(site, layer, subject.n_layers): layer for layer in range(subject.n_layers)}
        sink = TokenSink(rows, list(names.values()), subject)
        with torch.inference_mode():
            run_bridge(subject, rows, [[9, 2, 0], [1, 3, 4, 5, 6, 7, 8, 10]], names, sink)
        found = torch.split(sink.values, [row.length for row in rows], dim=1)
        for i in (1, 2, 5):
            _, cache = subject.run_with_cache(rows[i])
            expected = torch.stack([cache[name][0] for name in names])
            assert apart(found[i], expected) < CLOSE

    def test_match_the_plain_model_s_modules(self, subjects, rows):
        """Without TransformerLens: a Llama block's attention and MLP outputs, and the stream between them."""
        subject, row = subjects("llama"), rows[2]
        kept = {}
        block = subject.blocks[1]
        handles = [
            block.self_attn.register_forward_hook(lambda _m, _a, out: kept.update(attn_out=out[0][0])),
            block.mlp.register_forward_hook(lambda _m, _a, out: kept.update(mlp_out=out[0])),
            block.register_forward_pre_hook(lambda _m, args: kept.update(resid=args[0][0])),
        ]
        with torch.inference_mode():
            subject.model(torch.tensor([row.ids]))
        for handle in handles:
            handle.remove()
        kept["resid_mid"] = kept["resid"] + kept["attn_out"]
        for site in SITES:
            sink = TokenSink([row], [1], subject)
            with torch.inference_mode():
                run_bridge(subject, [row], [[0]], {hook_name(site, 1, subject.n_layers): 1}, sink)
            assert apart(sink.values[0], kept[site]) < CLOSE

    def test_a_hook_that_never_fires_is_an_error(self, rows):
        """Blocks with attention and MLP side by side have no stream between them: zeros would be believed."""
        tok = tiny.tokenizer()
        config = transformers.GPTNeoXConfig(
            **tiny.WIDTH, num_hidden_layers=2, vocab_size=len(tok), use_parallel_residual=True
        )
        torch.manual_seed(0)
        subject = wrap(transformers.GPTNeoXForCausalLM(config), tok, "parallel")
        for site, raises in (("mlp_out", None), ("resid_mid", InterpError)):
            names = {hook_name(site, layer, 2): layer for layer in range(2)}
            context = (
                pytest.raises(raises, match=r"parallel has no blocks\.0\.hook_resid_mid") if raises else nullcontext()
            )
            with torch.inference_mode(), context:
                run_bridge(subject, rows[:2], [[0, 1]], names, TokenSink(rows[:2], range(2), subject))

    def test_hook_names_are_transformer_lens_s(self, subjects, rows):
        """Every one is a key of its cache."""
        subject = subjects("llama")
        _, cache = subject.run_with_cache(rows[0])
        found = [hook_name(site, layer, 3) for site in SITES for layer in range(3 + (site == "resid"))]
        assert len(set(found)) == 13
        assert set(found) <= set(cache)
        assert hook_name("resid", 3, 3) == "blocks.2.hook_resid_post"


class TestSurprise:
    """Log-probabilities of the completion's tokens, from the same pass."""

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "granite", "cohere"])
    def test_matches_log_softmax_of_the_plain_logits(self, subjects, rows, architecture, monkeypatch):
        """Scaled and capped unembeddings, completions of one token, more tokens than are unembedded at once."""
        monkeypatch.setattr(capture, "LOGIT_ROWS", 30)
        subject = subjects(architecture)
        assert min(row.stop - row.start for row in rows) == 1
        surprise = Surprise(rows, subject)
        with torch.inference_mode():
            run_shared(subject, rows, [[3, 1, 4, 0], [2, 10, 9, 8, 5, 6, 7]], None, surprise)
        for row, found in zip(rows, surprise.values, strict=True):
            with torch.inference_mode():
                told = subject.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            each = torch.stack([told[t - 1, row.ids[t]] for t in range(row.start, row.stop)])
            expected = torch.stack([each.mean(), each.min(), each[-1]])
            # Nats, of a size around 6: absolute.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere"])
    def test_logits_are_capped_and_scaled(self, subjects, rows, architecture):
        """The control: the bare unembedding gives other logits than the model, `Subject.logits` the same."""
        subject = subjects(architecture)
        ids = torch.tensor([rows[0].ids])
        with torch.inference_mode():
            hidden = subject.body(ids).last_hidden_state
            expected = subject.model(ids).logits
            assert apart(subject.logits(hidden), expected) < CLOSE
            assert apart(subject.model.get_output_embeddings()(hidden), expected) > 0.1

    def test_running_states(self, rows):
        """Whole rows at a time."""
        tok = tiny.tokenizer()
        config = transformers.Lfm2Config(
            **tiny.WIDTH, num_hidden_layers=2, num_key_value_heads=2, vocab_size=len(tok), full_attn_idxs=[1]
        )
        torch.manual_seed(0)
        subject = wrap(transformers.Lfm2ForCausalLM(config), tok)
        surprise = Surprise(rows[:3], subject)
        with torch.inference_mode():
            run_shared(subject, rows[:3], [[0, 1, 2]], None, surprise)
            told = subject.model(torch.tensor([rows[1].ids])).logits[0].log_softmax(-1)
        expected = torch.stack([told[t - 1, rows[1].ids[t]] for t in range(rows[1].start, rows[1].stop)]).mean()
        torch.testing.assert_close(surprise.values[1, 0], expected, rtol=0, atol=1e-4)


class TestHooks:
    """Acquired, used, released."""

    @staticmethod
    def hooks_of(module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    def test_hooks_are_gone_after_the_block(self, subjects, rows):
        """And there within it."""
        subject = subjects("llama")
        before = self.hooks_of(subject.model)
        with residual_hooks(subject, range(4), lambda layer, hidden: None):
            assert self.hooks_of(subject.model) == before + 4
        assert self.hooks_of(subject.model) == before

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_hooks_are_gone_after_an_exception_in_the_forward_pass(self, subjects, rows, error):
        """Out of memory in the third block must not leave the first two hooked."""
        subject = subjects("llama")
        before = self.hooks_of(subject.model)

        def sink(layer, hidden):
            if layer == 2:
                raise error("in the forward pass")

        with pytest.raises(error), torch.inference_mode(), residual_hooks(subject, range(4), sink):
            run_shared(subject, rows[:1], [[0]])
        assert self.hooks_of(subject.model) == before
        assert apart(tokens_of(subject, [rows[0]])[0], tiny.hidden_states(subject, rows[0].ids)) < CLOSE

    def test_hooks_are_gone_when_one_cannot_be_set(self, subjects):
        """A layer that does not exist."""
        subject = subjects("llama")
        before = self.hooks_of(subject.model)
        with pytest.raises(IndexError), residual_hooks(subject, [0, 1, -7], lambda layer, hidden: None):
            pass
        assert self.hooks_of(subject.model) == before

    def test_bridge_hooks_are_gone_after_an_exception(self, subjects, rows):
        """The bridge's own hook points, too."""
        subject = subjects("llama")

        class Broken(TokenSink):
            def __call__(self, layer, hidden):
                raise RuntimeError("in the forward pass")

        with pytest.raises(RuntimeError, match="forward pass"), torch.inference_mode():
            run_bridge(subject, rows[:1], [[0]], {"blocks.1.hook_mlp_out": 1}, Broken(rows[:1], [1], subject))
        assert not any(point.fwd_hooks for point in subject.bridge.hook_dict.values())

    def test_sinks_leave_the_stream_as_it_is(self, subjects, rows):
        """Reading must not steer: the logits with hooks are bit for bit those without."""
        subject = subjects("llama")
        layers = range(4)
        ids = torch.tensor([rows[0].ids])
        plain = []
        hooked = []
        sink = PositionSink(rows[:1], layers, ("mean",), subject)
        with torch.inference_mode():
            run_shared(subject, rows[:1], [[0]], None, lambda stage, hidden: plain.append(hidden.clone()))
            with residual_hooks(subject, layers, sink):
                run_shared(subject, rows[:1], [[0]], sink.begin, lambda stage, hidden: hooked.append(hidden.clone()))
            assert subject.model(ids).logits.isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))

    def test_private_copy_shares_weights_and_not_hooks(self, subjects, rows):
        """A worker's own modules over the same tensors."""
        subject = subjects("llama")
        other = private_copy(subject)
        assert {p.data_ptr() for p in other.model.parameters()} == {p.data_ptr() for p in subject.model.parameters()}
        # transformers leaves hooks of its own behind once hidden states were asked for.
        before = self.hooks_of(subject.model)
        with residual_hooks(other, range(4), lambda layer, hidden: None):
            assert self.hooks_of(subject.model) == before
            assert self.hooks_of(other.model) == before + 4
        assert torch.equal(tokens_of(other, rows)[1], tokens_of(subject, rows)[1])


class TestPadding:
    """Ids and masks."""

    @given(
        sequences=st.lists(st.lists(st.integers(20, 99), min_size=1, max_size=9), min_size=1, max_size=5),
        side=st.sampled_from(["left", "right"]),
    )
    @settings(deadline=None)
    def test_matches_the_tokenizer_s_own(self, sequences, side):
        """transformers' `pad` is the oracle."""
        tok = tiny.tokenizer()
        expected = tok.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt")
        ids, mask = pad(sequences, tok, side)
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"])

    def test_tokenizer_without_padding(self):
        """Any id will do under a mask."""
        ids, mask = pad([[5], [6, 7]], tiny.tokenizer(pad_token=None), "left")
        assert ids.tolist() == [[0, 5], [6, 7]]
        assert mask.tolist() == [[0, 1], [1, 1]]

    def test_prompt_groups_keep_the_order(self):
        """Rows by the tokens before their completion, as they appear."""
        made = [Encoded(ids, 2, 3, 3) for ids in ((1, 2, 3, 0), (4, 5, 6, 0), (1, 2, 7, 0))]
        assert prompt_groups(made) == {(1, 2): [0, 2], (4, 5): [1]}
