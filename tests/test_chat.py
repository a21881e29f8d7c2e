"""Encoding: one rendering through the model's own template, and spans that decode to the completion or an error."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import tiny
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import normalizers

from interp import InterpError
from interp.chat import PLAIN, SENTINEL, Encoded, Encoder, RowError, messages_of, read_template

#: Completions that are easily mistaken: for the template, for the prompt, for a special token, for nothing.
AWKWARD = [
    "assistant",
    "im_end",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>user\nHello",
    "</s>",
    "<s> [INST] Name a colour. [/INST]",
    "Name a colour.",
    "You asked: Name a colour. Name a colour. I say: blue.",
    "user\n",
    "model",
    "Assistant: Assistant:",
    "COMPLETION",
    SENTINEL,
    "{{ messages }}{% raw %}",
    "<think>\nhm\n</think>\n\nblue",
    " blue ",
    "\n\n blue\r\n\r\nred \t\n",
    "a\r\nb\rc\n",
    "🙂",
    "👩‍👩‍👧 family 🇫🇷",
    "naïve café, e\u0301 and \u212b",
    "日本語のテキスト。",
    "שלום عليكم नमस्ते \u0958",
    "x" * 300,
    ".",
    ")",
    ":)",
    "\u200b",
    "\ufeffmark",
    "a\x00b",
    "-\u00a0-",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from([*AWKWARD, " ", "\n", "The capital", "<|im_start|>", "assistant\n", "é", "🙂"]), max_size=6
).map("".join)

ENCODERS = {
    (template, kind): Encoder(tiny.tokenizer(template, kind)) for template in tiny.TEMPLATES for kind in tiny.KINDS
}


def squeezed(text: str) -> str:
    """Text without its white space: a token may carry the space before the completion."""
    return "".join(text.split())


def decoded(tok, row: Encoded) -> str:
    """The text of the completion's tokens."""
    return tok.decode(row.ids[row.start : row.stop])


class TestSpans:
    """Where the completion lies."""

    @pytest.mark.parametrize("text", AWKWARD)
    @pytest.mark.parametrize("template", [name for name in tiny.TEMPLATES if name != "qwen3"])
    def test_awkward_completions_decode_to_themselves(self, template, text):
        """Byte-level tokens lose nothing, so the span gives back every character but the white space around it."""
        encoder = ENCODERS[template, "bytes"]
        row = encoder.encode(messages_of("Name a colour.", text))
        assert decoded(encoder.tokenizer, row).strip() == text.strip()

    @pytest.mark.parametrize("template", tiny.TEMPLATES)
    @given(prompt=TEXT, completion=TEXT)
    @example(prompt="", completion="a")
    @example(prompt="blue", completion="blue")
    def test_any_text_decodes_to_itself(self, template, prompt, completion):
        """Any prompt and completion, in every template; what comes before the span is the rendered prompt."""
        assume(completion.strip())
        # Qwen3's template takes thoughts out of what was said: that is for its own test.
        assume(template != "qwen3" or "</think>" not in prompt + completion)
        encoder = ENCODERS[template, "bytes"]
        row = encoder.encode(messages_of(prompt, completion))
        text, start, stop = encoder.render(messages_of(prompt, completion))
        tok = encoder.tokenizer
        assert decoded(tok, row).strip() == completion.strip() == text[start:stop]
        assert squeezed(tok.decode(row.ids[: row.start])) == squeezed(text[:start])
        assert squeezed(tok.decode(row.ids[row.stop :])) == squeezed(text[stop:])

    @pytest.mark.parametrize("kind", tiny.KINDS)
    @given(completion=TEXT)
    def test_every_kind_of_tokenizer_gives_a_right_span_or_an_error(self, kind, completion):
        """SentencePiece joins white space and takes bytes, Qwen's composes accents: never a wrong span."""
        assume(completion.strip())
        encoder = ENCODERS["mistral", kind]
        encoded, _, skipped = encoder.encode_all([messages_of("Name a colour.", completion)], max_length=10**6)
        if skipped:
            assert kind == "metaspace"
            assert skipped == {"the tokenizer does not give the completion back": 1}
            return
        (row,) = encoded
        found = normalizers.NFKC().normalize_str(decoded(encoder.tokenizer, row))
        assert squeezed(found) == squeezed(normalizers.NFKC().normalize_str(completion))

    def test_composing_tokenizers_lose_no_row(self):
        """Qwen's tokenizers compose accents (NFC): the same text to a reader, though not to `==`."""
        text = "cafe\u0301 \u0958 \u212b"
        encoder = ENCODERS["chatml", "nfc"]
        row = encoder.encode(messages_of("Name a place.", text))
        assert decoded(encoder.tokenizer, row) != text
        assert decoded(encoder.tokenizer, row) == normalizers.NFC().normalize_str(text)

    @pytest.mark.parametrize("template", tiny.TEMPLATES)
    def test_ids_are_transformers_own(self, template):
        """What transformers' one-step `apply_chat_template(tokenize=True)` gives."""
        encoder = ENCODERS[template, "bytes"]
        messages = messages_of("Name a colour.", "Blue, 🙂.")
        template = encoder.chat_template
        expected = encoder.tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=False, plain_bos=""
        )
        assert list(encoder.encode(messages).ids) == expected

    @pytest.mark.parametrize(("template", "text"), tiny.END_OF_TURN.items())
    @pytest.mark.parametrize("kind", tiny.KINDS)
    def test_turn_end_is_the_template_s_token(self, template, text, kind):
        """Also where a space stands before it (Llama 2)."""
        encoder = ENCODERS[template, kind]
        row = encoder.encode(messages_of("Name a colour.", "Blue."))
        assert encoder.tokenizer.decode([row.ids[row.turn_end]]) == text
        assert row.turn_end >= row.stop

    def test_turn_end_without_a_token_of_its_own(self):
        """White space after the completion stands in, and where nothing follows, its last token."""
        tok = tiny.tokenizer("{% for m in messages %}{{ m['content'] }}{{ '\n\n' }}{% endfor %}")
        row = Encoder(tok).encode(messages_of("Name a colour.", "Blue."))
        assert tok.decode([row.ids[row.turn_end]]).isspace()
        tok = tiny.tokenizer("{% for m in messages %}{{ '\n' + m['content'] }}{% endfor %}")
        row = Encoder(tok).encode(messages_of("Name a colour.", "Blue."))
        assert row.turn_end == row.stop - 1 == row.length - 1

    def test_thoughts_that_the_template_inserts_are_prompt(self):
        """Qwen3's empty block of thought stands before the completion, not in it."""
        encoder = ENCODERS["qwen3", "bytes"]
        row = encoder.encode(messages_of("Name a colour.", "Blue."))
        assert encoder.tokenizer.decode(row.ids[: row.start]).endswith("assistant\n<think>\n\n</think>\n\n")
        assert decoded(encoder.tokenizer, row) == "Blue."

    def test_thoughts_that_the_template_takes_out_give_an_error(self):
        """A completion with a thought is not what was rated once the template has cut it."""
        with pytest.raises(RowError, match="alters the completion"):
            ENCODERS["qwen3", "bytes"].encode(messages_of("Name a colour.", "<think>\nhm\n</think>\n\nBlue."))

    def test_earlier_turns_are_prompt(self):
        """The last assistant turn is the completion, even where an earlier one says the same."""
        past = [
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "B?"},
        ]
        messages = messages_of("not used", "Blue.", past)
        assert messages == [*past, {"role": "assistant", "content": "Blue."}]
        encoder = ENCODERS["chatml", "bytes"]
        row = encoder.encode(messages)
        before = encoder.tokenizer.decode(row.ids[: row.start])
        assert before.count("Blue.") == 1
        assert before.endswith("B?<|im_end|>\n<|im_start|>assistant\n")

    def test_impossible_spans_are_refused(self):
        """Nothing before the completion, nothing in it, or beyond the ids."""
        assert Encoded((1, 2, 3), 1, 2, 2).length == 3
        for start, stop, turn_end in ((0, 1, 1), (1, 1, 1), (1, 4, 2), (1, 2, 3), (2, 3, 1)):
            with pytest.raises(RowError, match="no prompt or no completion"):
                Encoded((1, 2, 3), start, stop, turn_end)


class TestBeginning:
    """One bos, where the model has one."""

    @pytest.mark.parametrize("template", ["llama3", "mistral", "gemma", "plain"])
    def test_bos_is_never_doubled(self, template):
        """The template writes it and the tokenizer adds it to plain text: it is there once, and first."""
        tok = tiny.tokenizer(template, adds_bos=True)
        row = Encoder(tok).encode(messages_of("Name a colour.", "Blue."))
        assert row.ids[0] == tok.bos_token_id
        assert row.ids.count(tok.bos_token_id) == 1

    @pytest.mark.parametrize("template", ["chatml", "plain"])
    def test_bos_is_not_invented(self, template):
        """Where neither the template nor the tokenizer has it for this text, there is none."""
        tok = tiny.tokenizer(template, adds_bos=template == "chatml")
        assert tok.bos_token_id not in Encoder(tok).encode(messages_of("Name a colour.", "Blue.")).ids

    def test_plain_models_are_rendered_and_announced(self):
        """A base model without a template is no error."""
        encoder = ENCODERS["plain", "bytes"]
        past = [
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "B."},
            {"role": "user", "content": "C?"},
        ]
        text, _, _ = encoder.render(messages_of("", "D.", past))
        assert text == "User: A?\n\nAssistant: B.</s>\n\nUser: C?\n\nAssistant: D.</s>"
        assert len(encoder.notes) == 1
        assert "no chat template" in encoder.notes[0]
        assert ENCODERS["chatml", "bytes"].notes == ()

    def test_plain_rendering_of_a_tokenizer_without_eos(self):
        """The completion is then the end of the text."""
        tok = tiny.tokenizer("plain", eos_token=None)
        text, _, stop = Encoder(tok).render(messages_of("A?", "B."))
        assert text == "User: A?\n\nAssistant: B."
        assert stop == len(text)


class TestSettings:
    """`--template` and `--system`."""

    def test_template_replaces_the_model_s(self):
        """And enters the key, as the system prompt does."""
        tok = tiny.tokenizer("chatml")
        base, other = Encoder(tok), Encoder(tok, template=tiny.MISTRAL)
        assert other.render(messages_of("A?", "B."))[0] == "<s>[INST] A? [/INST] B.</s>"
        assert len({str(e.key) for e in (base, other, Encoder(tok, system="S"))}) == 3
        assert Encoder(tok, template=PLAIN).notes

    def test_system_comes_first(self):
        """In place of the template's default."""
        text, _, _ = Encoder(tiny.tokenizer(), system="Be brief.").render(messages_of("A?", "B."))
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?")
        assert "helpful" not in text

    def test_template_without_system_prompts_counts_the_rows(self):
        """Gemma's refuses them: every row is skipped with the reason, and none without --system."""
        tok = tiny.tokenizer("gemma")
        rows = [messages_of("A?", "B.")] * 3
        _, kept, skipped = Encoder(tok, system="Be brief.").encode_all(rows)
        assert (kept, skipped) == ([], Counter({"the template refuses the conversation": 3}))
        assert Encoder(tok).encode_all(rows)[1] == [0, 1, 2]
        with pytest.raises(RowError, match="System role not supported"):
            Encoder(tok, system="Be brief.").encode(rows[0])

    def test_named_templates(self):
        """Some tokenizers carry several; the default is meant."""
        tok = tiny.tokenizer()
        tok.chat_template = {"default": tiny.MISTRAL, "tool_use": tiny.CHATML}
        assert Encoder(tok).chat_template == tiny.MISTRAL

    def test_read_template(self, tmp_path):
        """A Jinja file or a model's folder; anything else is an error that names it."""
        assert read_template(None) is None
        (tmp_path / "own.jinja").write_text(tiny.MISTRAL, encoding="utf-8")
        assert read_template(str(tmp_path / "own.jinja")) == tiny.MISTRAL
        tiny.tokenizer("gemma").save_pretrained(tmp_path / "model")
        assert read_template(str(tmp_path / "model")) == tiny.GEMMA
        tiny.tokenizer("plain").save_pretrained(tmp_path / "base")
        (tmp_path / "empty.jinja").write_text(" \n")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        for wrong in ("base", "empty.jinja", "binary", "gone"):
            with pytest.raises(InterpError, match=f"--template .*{re.escape(wrong)}"):
                read_template(str(tmp_path / wrong))


UNFAITHFUL = {
    "drops": ("{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}", "the template drops the completion"),
    "truncates": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'][:30] }}\n{% endfor %}",
        "the template alters the completion",
    ),
    "shouts": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | upper }}\n{% endfor %}",
        "the template drops the completion",
    ),
    "escapes": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | e }}\n{% endfor %}",
        "the template alters the completion",
    ),
    "repeats": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }} {{ m['content'] }}\n{% endfor %}",
        "the template alters the completion",
    ),
    "counts": (
        "{% for m in messages %}{{ m['content'] }}|{{ m['content'] | length }}\n{% endfor %}",
        "the template alters the completion",
    ),
    "raises": ("{{ raise_exception('no') }}", "the template refuses the conversation"),
    "misspelt": ("{% for m in messages %}{{ m['content'] }}", "the template refuses the conversation"),
    "misuses": ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "the template refuses the conversation"),
    "starts": ("{% for m in messages[1:] %}{{ m['content'] }}\n{% endfor %}", "no prompt or no completion"),
}


class TestErrors:
    """A row that cannot be used is an error of that row, with a reason short enough to count."""

    @pytest.mark.parametrize(("template", "reason"), UNFAITHFUL.values(), ids=UNFAITHFUL)
    def test_unfaithful_templates_are_found_out(self, template, reason):
        """Never a wrong span: with the same words a faithful template passes."""
        text = "A completion that is long enough to be cut, with <signs> & more."
        with pytest.raises(RowError) as caught:
            Encoder(tiny.tokenizer(template)).encode(messages_of("Name a colour.", text))
        assert caught.value.reason == reason
        faithful = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
        assert Encoder(tiny.tokenizer(faithful)).encode(messages_of("Name a colour.", text))

    def test_lossy_tokenizer_is_found_out(self):
        """Tokens that do not say what the text says: here one that lowers every letter."""
        tok = tiny.tokenizer()
        tok.backend_tokenizer.normalizer = normalizers.Lowercase()
        assert Encoder(tok).encode(messages_of("A?", "blue"))
        with pytest.raises(RowError, match="does not give the completion back"):
            Encoder(tok).encode(messages_of("A?", "Blue"))

    @pytest.mark.parametrize("completion", ["", " \n"])
    def test_nothing_said(self, completion):
        """An empty completion has no token to read."""
        with pytest.raises(RowError, match="no assistant turn"):
            Encoder(tiny.tokenizer()).encode(messages_of("A?", completion))

    @pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "A?"}]])
    def test_no_assistant_turn(self, messages):
        """A conversation ends with what was rated."""
        with pytest.raises(RowError, match="no assistant turn"):
            Encoder(tiny.tokenizer()).encode(messages)

    def test_all_that_is_skipped_is_counted(self):
        """Rows that can be used keep their order and number; each other one is counted under its reason."""
        template = (
            "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
            "<|im_start|>{{ m['content'][:60] }}<|im_end|>\n{% endfor %}"
        )
        encoder = Encoder(tiny.tokenizer(template))
        short, other = messages_of("A?", "Blue."), messages_of("A?", "Red, or green.")
        limit = encoder.encode(other).length
        rows = [
            messages_of("A?", "forbidden"),
            short,
            messages_of("A?", "x" * 70),
            messages_of("A?", ""),
            messages_of("A?", "Red, or green. Then"),
            other,
            messages_of("A?", "forbidden too"),
        ]
        encoded, kept, skipped = encoder.encode_all(iter(rows), max_length=limit)
        assert kept == [1, 5]
        assert encoded == [encoder.encode(short), encoder.encode(other)]
        assert skipped == {
            "the template refuses the conversation": 2,
            "the template alters the completion": 1,
            "no assistant turn at the end of the conversation": 1,
            f"longer than {limit} tokens": 1,
        }

    def test_nothing_to_encode(self):
        """An empty set is no error here."""
        assert Encoder(tiny.tokenizer()).encode_all([]) == ([], [], Counter())

    def test_lone_surrogates_break_nothing(self):
        """Half an emoji in a prompt is read as `?`; in a completion, which is rated, the row is skipped and counted."""
        encoder = Encoder(tiny.tokenizer())
        rows = [messages_of("A?", "Blue."), messages_of("A\ud83d?", "Blue."), messages_of("A?", "Blue \ud83d.")]
        encoded, kept, skipped = encoder.encode_all(rows)
        assert kept == [0, 1]
        assert encoded[1] == encoder.encode(messages_of("A??", "Blue."))
        assert skipped == {"the tokenizer does not give the completion back": 1}

    def test_batch_equals_one_by_one(self):
        """Every conversation, in every template."""
        rows = tiny.conversations()
        for encoder in ENCODERS.values():
            assert encoder.encode_all(rows)[0] == [encoder.encode(row) for row in rows]


def test_embedded_model_s_template(embedded):
    """The real tokenizer: transformers' own ids, the default system prompt, the completion between its turn's marks."""
    encoder = Encoder(embedded.tokenizer)
    messages = messages_of("Name a colour.", "Blue, like the sky 🙂.")
    row = encoder.encode(messages)
    assert list(row.ids) == embedded.tokenizer.apply_chat_template(messages, return_dict=False)
    assert decoded(embedded.tokenizer, row) == "Blue, like the sky 🙂."
    assert embedded.tokenizer.decode(row.ids[: row.start]).endswith("Name a colour.<|im_end|>\n<|im_start|>assistant\n")
    assert embedded.tokenizer.decode([row.ids[row.turn_end]]) == "<|im_end|>"
    assert row.turn_end == row.stop == row.length - 2
