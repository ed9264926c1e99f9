"""Text to token ids and back, from a Hugging Face folder.

BOS stands once at the start of an encoded prompt if tokenizer.json's post-processor adds it or tokenizer_config.json sets ``add_bos_token``;
what a chat template renders is encoded as it is, because templates write their own BOS. Special-token text in a prompt, or in the strings of a
chat, is text like any other unless ``parse_special`` is set.
"""
from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from tpllm.checkpoint.reads import read_noted
from tpllm.errors import CheckpointError, PromptError, TokenizerError
from tpllm.tokenizer.chat_template import ChatTemplate, choose_template
from tpllm.tokenizer.decoder_stages import Stage, decoder_specs, make_stages
from tpllm.tokenizer.detokenizer import run_stages
from tpllm.tokenizer.folder import TokenizerFolder, read_folder
from tpllm.tokenizer.messages import checked_messages, checked_text, plain_value
from tpllm.tokenizer.special_text import SpecialTextGuard, encode_guarded
from tpllm.tokenizer.tool_arguments import with_taken_arguments

_ANCHOR = "a"  # a piece before a token whose text is wanted as it stands within a sentence


class Tokenizer:
    """A model's tokenizer; it is never changed after loading, so threads may share it.

    Attributes:
        bos_token_id: id of the beginning-of-sequence token, None where the tokenizer has none.
        pad_token_id: id of the padding token, or None.
        eos_token_ids: every id that ends a text: the tokenizer's, config.json's and generation_config.json's.
        special_ids: ids of every special token.
        vocab_size: one more than the largest id.
        default_sampling: sampling values that generation_config.json sets, named as in ``SamplingParams``; ``do_sample`` is not read (as in vLLM).
    """

    def __init__(self, backend: tokenizers.Tokenizer, folder: TokenizerFolder):
        self._backend, self._folder = backend, folder
        backend.no_truncation()  # some tokenizer.json keep the settings of a training run, which would cut or pad prompts
        backend.no_padding()
        _add_special_tokens(backend, folder)
        added = backend.get_added_tokens_decoder()
        self._special_texts = {token.content for token in added.values() if token.special}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_token_id, self.pad_token_id, self._unk_id = (self._named_id(name) for name in ("bos_token", "pad_token", "unk_token"))
        tokenizer_eos = self._named_id("eos_token")
        self.eos_token_ids = frozenset(folder.configured_ids("eos_token_id")) | ({tokenizer_eos} - {None})
        self.default_sampling = folder.default_sampling()
        self._decoder_specs = decoder_specs(backend.decoder)

    @classmethod
    def from_folder(cls, path: pathlib.Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Raises:
            TokenizerError: tokenizer.json is missing or cannot be read, or a file beside it is damaged; it says what to do.
        """
        path = pathlib.Path(path)
        folder = read_folder(path)
        try:
            backend = tokenizers.Tokenizer.from_buffer(read_noted(path / "tokenizer.json"))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path / 'tokenizer.json'} cannot be read ({error}); "
                                 "fetch the file again, or update the tokenizers package") from error
        return cls(backend, folder)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a prompt.

        Args:
            text: any text; an empty one gives at most the BOS.
            add_special_tokens: add BOS, and what else the tokenizer's post-processor adds. A BOS that the text itself begins with is not doubled.
            parse_special: read special-token text as special tokens.

        Raises:
            PromptError: not a text, or special-token text that this tokenizer cannot take as plain text.
        """
        checked_text(text, "the prompt")
        encoding = self._backend.encode(text, add_special_tokens=False) if parse_special else self._encode_plain(text)
        if not add_special_tokens:
            return encoding.ids
        bos, has_bos = self.bos_token_id, encoding.ids[:1] == [self.bos_token_id]
        ids = self._backend.post_process(encoding).ids
        if has_bos and ids[:2] == [bos, bos]:
            return ids[1:]
        if self._folder.settings.get("add_bos_token") is True and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def render_chat(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, template_kwargs: Mapping | None = None,
                    tools: Sequence[Mapping] | None = None) -> str:
        """The text that the model's chat template makes of messages; see :meth:`encode_chat`."""
        guard = SpecialTextGuard(())
        return self._render(guard, messages, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs, tools=tools)

    def encode_chat(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, template_kwargs: Mapping | None = None,
                    tools: Sequence[Mapping] | None = None, parse_special: bool = False) -> list[int]:
        """Ids of a chat under the model's chat template. Nothing is added to what the template writes.

        Args:
            messages: ``{"role": ..., "content": ...}``; content is a text or a list of ``{"type": "text", "text": ...}``.
            add_generation_prompt: end with the header of the answer.
            template_kwargs: further variables of the template, such as ``enable_thinking``; they go before the tokenizer's own.
            tools: JSON schemas of the functions that the model may call.
            parse_special: read special-token text in messages, tools and template_kwargs as special tokens; the template's own always are.

        Raises:
            PromptError: malformed messages; it names the index and the fix.
            TokenizerError: no template, or one that fails or refuses the messages; it holds the template's message.
        """
        guard = SpecialTextGuard(() if parse_special else self._special_texts)
        text = self._render(guard, messages, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs, tools=tools)
        encoding = self._backend.encode(text, add_special_tokens=False)
        if not guard.has_hidden(text):
            return encoding.ids
        return encode_guarded(encoding, text, guard=guard, is_boundary=self._is_special_over, encode_plain=self._encode_stretch)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; ids outside the vocabulary have none, broken UTF-8 becomes U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        ids = [int(token_id) for token_id in token_ids]
        return self._backend.decode([i for i in ids if i not in skipped and 0 <= i < self.vocab_size], skip_special_tokens=False)

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it, None for an id outside of it."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_text(self, token_id: int) -> str:
        """A token's text as within a sentence, its leading space kept; U+FFFD for a part of a character."""
        piece = self.piece(token_id)
        if piece is None:
            return ""
        return run_stages(self.make_decoder_stages(), [_ANCHOR, piece], is_last=True).removeprefix(_ANCHOR)

    def make_decoder_stages(self) -> list[Stage]:
        """Fresh stages that turn pieces into text, for one text."""
        return make_stages(self._decoder_specs)

    def _named_id(self, name: str) -> int | None:
        """Id of a named special token; config.json is asked only where no file names the tokenizer's tokens."""
        names = self._folder.special_names()
        if name in names:
            return self._backend.token_to_id(names[name])
        ids = [] if self._folder.settings else self._folder.configured_ids(f"{name}_id")
        return ids[0] if ids else None

    def _render(self, guard: SpecialTextGuard, messages, *, add_generation_prompt, template_kwargs, tools) -> str:
        names = self._folder.special_names()
        messages = with_taken_arguments(messages, lambda: self._template_for(tools).argument_forms(names))
        messages = guard.hide(checked_messages(messages))
        if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
            raise PromptError(f"tools is {tools!r}; give a list of JSON schemas (dicts), or None")
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise PromptError(f"template_kwargs is {template_kwargs!r}; give a dict such as {{'enable_thinking': False}}, or None")
        given = {key: value if key in names else guard.hide(value)
                 for key, value in plain_value(template_kwargs or {}, "template_kwargs").items()}
        context = {**names, "tools": guard.hide(plain_value(tools, "tools")), "documents": None,
                   "add_generation_prompt": add_generation_prompt, **given}
        return self._template_for(tools).render(messages, context)

    def _template_for(self, tools) -> ChatTemplate:
        return self._tool_template if tools else self._default_template

    @functools.cached_property
    def _default_template(self) -> ChatTemplate:
        return choose_template(self._folder.templates, has_tools=False)

    @functools.cached_property
    def _tool_template(self) -> ChatTemplate:
        return choose_template(self._folder.templates, has_tools=True)

    def _encode_plain(self, text: str) -> tokenizers.Encoding:
        """Special-token text taken as plain text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self.special_ids.isdisjoint(encoding.ids):
            return encoding
        encoding = self._plain_backend.encode(text, add_special_tokens=False)
        self._refuse_special(encoding.ids)
        return encoding

    def _encode_stretch(self, text: str, *, is_start: bool) -> list[int]:
        """Plain ids of a text that begins a prompt or follows a special token."""
        ids = (self._plain_backend if is_start else self._following_backend).encode(text, add_special_tokens=False).ids
        self._refuse_special(ids)
        return ids

    def _refuse_special(self, ids: list[int]) -> None:
        # Some models (Unigram) have their special tokens in the vocabulary that ordinary text is cut into.
        found = (self.special_ids - {self._unk_id}).intersection(ids)
        if found:
            raise PromptError(f"the prompt holds the text of the special token {self.piece(min(found))!r}, which this tokenizer cannot take "
                              "as plain text; remove it, or allow it with parse_special=True")

    def _is_special_over(self, token_id: int, span: str) -> bool:
        """Whether a special token's id stands for its own text, and not (unknown) for characters outside the vocabulary."""
        return token_id in self.special_ids and (token_id != self._unk_id or self.piece(token_id) in span)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        # A second tokenizer, because the attribute cannot be changed while another thread encodes.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _following_backend(self) -> tokenizers.Tokenizer:
        """As the plain one, but a text is not the start of a prompt: SentencePiece's space goes before the first word of a prompt only."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        backend.encode_special_tokens = True
        return backend


def _add_special_tokens(backend: tokenizers.Tokenizer, folder: TokenizerFolder) -> None:
    """Tokens that only tokenizer_config.json knows. One that would get another id than it names, or a new one, has no row in the model."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in folder.numbered_tokens().items():
        known = backend.token_to_id(token.content)
        if token.content not in added and (known == token_id or (known is None and token_id == backend.get_vocab_size(with_added_tokens=True))):
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            added[token.content] = token
    for text, token in folder.special_tokens().items():
        if text in added and not added[text].special:
            old = added[text]  # its flags stay, it only becomes special
            token = tokenizers.AddedToken(text, single_word=old.single_word, lstrip=old.lstrip, rstrip=old.rstrip,
                                          normalized=old.normalized, special=True)
        if backend.token_to_id(text) is not None and not (text in added and added[text].special):
            backend.add_special_tokens([token])
