"""A conversation -> token ids through the model's own chat template, once, with exact spans.

The completion's place in the rendered text is found with a sentinel: the same conversation is rendered with a
marker instead of the completion, and the text must then be prefix + completion + suffix, to the character. A
template that drops or rewrites the completion fails that check and gives an error for the row instead of a
wrong span. The ids come from the rendered text (no second bos), the spans from the tokenizer's character
offsets, and each span is decoded and compared with the completion.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import InterpError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]

#: Stands for the completion while the template is rendered. Plain letters, so that no template alters it.
SENTINEL = "COMPLETIONq7v3xSENTINEL"

#: For models without a template (plain base models). `eos` closes the turn, as a chat template's end of turn.
PLAIN = (
    "{{ plain_bos }}{% for m in messages %}"
    "{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m['role']] + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' if not loop.last else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


#: Conversations that are tokenized at once.
ENCODE_ROWS = 1024


class RowError(InterpError):
    """One row that cannot be encoded; `reason` is short, for counting."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{': ' if detail else ''}{detail}")
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids and the spans in it.

    `ids[start:stop]` is the completion; `start - 1` the last token before it (the end of the prompt);
    `turn_end` the template's end-of-turn token, the first after the completion that is no white space (where
    there is only white space its first token, and where the template puts nothing, the completion's last token).
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    turn_end: int

    def __post_init__(self) -> None:
        if not 0 < self.start < self.stop <= len(self.ids) or not self.start <= self.turn_end < len(self.ids):
            raise RowError("no prompt or no completion", f"span {self.start}:{self.stop} of {len(self.ids)} tokens")

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoder:
    """How conversations of one model are rendered and encoded.

    `template` replaces the tokenizer's own chat template; `system` is a system message put first.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    system: str | None = None

    @property
    def chat_template(self) -> str:
        return self.template or _default(getattr(self.tokenizer, "chat_template", None)) or PLAIN

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, in one line each."""
        if self.chat_template is PLAIN:
            return ("the model has no chat template: text is rendered as `User: ... Assistant: ...`",)
        return ()

    @property
    def key(self) -> dict[str, Any]:
        """What identifies this encoding (enters the content key of results)."""
        return {"template": self.chat_template, "system": self.system}

    def render(self, messages: Messages) -> tuple[str, int, int]:
        """(text, start, stop) of a conversation that ends with the assistant's turn, in characters."""
        messages = [dict(m) for m in messages]
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise RowError("no assistant turn at the end of the conversation")
        # White space around a turn says nothing, and many templates trim it: trimmed here for all alike.
        content = messages[-1]["content"].strip()
        turns = messages[:-1]
        text = self._apply([*turns, {"role": "assistant", "content": content}])
        marked = self._apply([*turns, {"role": "assistant", "content": SENTINEL}])
        prefix, found, suffix = marked.rpartition(SENTINEL)
        if not found:
            raise RowError("the template drops the completion")
        if text != prefix + content + suffix:
            raise RowError("the template alters the completion")
        return text, len(prefix), len(prefix) + len(content)

    def _apply(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, plain_bos=self._plain_bos
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError("the template refuses the conversation", str(error)) from error
        assert isinstance(rendered, str)
        return rendered

    @cached_property
    def _plain_bos(self) -> str:
        """The bos that this tokenizer would put before plain text, if any; only PLAIN asks for it."""
        ids = self.tokenizer("x")["input_ids"]
        has_bos = self.tokenizer.bos_token_id is not None and ids[0] == self.tokenizer.bos_token_id
        return str(self.tokenizer.bos_token) if has_bos else ""

    def encode(self, messages: Messages) -> Encoded:
        """Encode one conversation. Raises RowError when its spans cannot be trusted."""
        return self._encode_rendered([self.render(messages)])[0]

    def _encode_rendered(self, rendered: list[tuple[str, int, int]]) -> list[Encoded]:
        encoded = self._batch([text for text, _, _ in rendered])
        return [self._spans(*r, ids, off) for r, (ids, off) in zip(rendered, encoded, strict=True)]

    def _batch(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        # One text that cannot be encoded (a lone surrogate) must not take the others with it.
        texts = [t.encode("utf-8", "replace").decode() if not _is_utf8(t) else t for t in texts]
        out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(out["input_ids"], out["offset_mapping"], strict=True))

    def _spans(self, text: str, start: int, stop: int, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
        if not inside:
            raise RowError("no token lies in the completion")
        first, last = inside[0], inside[-1] + 1
        decoded = str(self.tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False))
        if _bare(decoded) != _bare(text[start:stop]):
            raise RowError("the tokenizer does not give the completion back", repr(decoded[:40]))
        written = (i for i in range(last, len(ids)) if text[slice(*offsets[i])].strip())
        return Encoded(tuple(ids), first, last, next(written, min(last, len(ids) - 1)))

    def encode_all(
        self, conversations: Iterable[Messages], max_length: int = 1024
    ) -> tuple[list[Encoded], list[int], Counter[str]]:
        """(encoded rows, their indices, skipped reasons): rows that cannot be used are counted, never silent.

        A row longer than `max_length` tokens is left out, not cut: a cut completion has another rating.
        """
        encoded, kept, skipped = [], [], Counter[str]()
        # A tokenizer's offsets take 700 bytes a token: a set is encoded in parts.
        numbered = enumerate(conversations)
        while part := list(islice(numbered, ENCODE_ROWS)):
            for index, row in self._encode_part(part):
                if isinstance(row, RowError):
                    skipped[row.reason] += 1
                elif row.length > max_length:
                    skipped[f"longer than {max_length} tokens"] += 1
                else:
                    encoded.append(row)
                    kept.append(index)
        return encoded, kept, skipped

    def _encode_part(self, part: list[tuple[int, Messages]]) -> Iterator[tuple[int, Encoded | RowError]]:
        """Each conversation's number with its encoding, or with what is wrong with it."""
        rendered: dict[int, tuple[str, int, int]] = {}
        for index, messages in part:
            try:
                rendered[index] = self.render(messages)
            except RowError as error:
                yield index, error
        batch = self._batch([text for text, _, _ in rendered.values()]) if rendered else []
        for (index, place), (ids, offsets) in zip(rendered.items(), batch, strict=True):
            try:
                yield index, self._spans(*place, ids, offsets)
            except RowError as error:
                yield index, error


def _bare(text: str) -> str:
    """What of a text must survive its tokens: all but white space (a token may carry the space before the
    completion) and the choice among equivalent code points (Qwen's tokenizers compose them, SentencePiece's fold).
    """
    return "".join(unicodedata.normalize("NFKC", text).split())


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def messages_of(prompt: str, completion: str, before: Messages | None = None) -> list[dict[str, str]]:
    """The conversation of a rated row: earlier turns where the set has them, else the prompt alone."""
    turns = [dict(m) for m in before] if before else [{"role": "user", "content": prompt}]
    return [*turns, {"role": "assistant", "content": completion}]


def read_template(source: str | None) -> str | None:
    """The text of a chat template: a Jinja file, or the template of a model's folder or Hub id."""
    if source is None:
        return None
    path = Path(source)
    try:
        if path.is_file():
            template = path.read_text(encoding="utf-8")
        else:
            from transformers import AutoTokenizer

            template = _default(AutoTokenizer.from_pretrained(source).chat_template)
    except (OSError, ValueError) as error:
        raise InterpError(f"--template {source!r} is no text file and no model that can be read") from error
    if not template or not template.strip():
        raise InterpError(f"--template {source!r} holds no chat template; give a Jinja file or a chat model")
    return template


def _default(template: str | dict[str, str] | None) -> str | None:
    """A tokenizer's chat template; some carry several by name (`default`, `tool_use`)."""
    return template.get("default") if isinstance(template, dict) else template
