"""Text to token ids and back, from a Hugging Face folder.

BOS stands once at the start of an encoded prompt if tokenizer.json's post-processor adds it or tokenizer_config.json sets ``add_bos_token``;
what a chat template renders is encoded as it is, because templates write their own BOS. Special-token text in a prompt is read as special tokens, as
in transformers; in the strings of a chat it is text like any other unless ``parse_special`` is set.
"""
import copy
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import tokenizers

from tpllm.errors import PromptError, short
from tpllm.tokenizer.added_tokens import add_missing_tokens
from tpllm.tokenizer.backend import Backend, border, library_of
from tpllm.tokenizer.chat_template import ChatTemplate, choose_template, given_template, up_to_last_message
from tpllm.tokenizer.decoder_stages import Stage, clean_up_stages, decoder_specs, make_stages, run_stages
from tpllm.tokenizer.folder import DEFAULT_TEMPLATE, TokenizerFolder, read_folder
from tpllm.tokenizer.generation_defaults import GenerationDefaults, default_sampling, ending_ids
from tpllm.tokenizer.messages import checked_messages, checked_text, plain_value, traced_messages, traced_value
from tpllm.tokenizer.special_text import encode_guarded
from tpllm.tokenizer.tool_arguments import with_taken_arguments
from tpllm.tokenizer.traced_text import TracedText
from tpllm.tokenizer.transformers_names import TransformersNames, listed_ids

ANYWAY = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
"""As transformers calls the setting without which it cleans up no BPE vocabulary's texts."""
_ANCHOR = "a"  # a piece before a token whose text is wanted as it stands within a sentence


class Tokenizer(TransformersNames):
    """A model's tokenizer; it is never changed after loading, so threads may share it.

    Attributes:
        bos_token_id: id of the beginning-of-sequence token, None where the tokenizer has none.
        eos_token_id: id of its end-of-sequence token, or None; ``eos_token_ids`` are all that end a text.
        pad_token_id: id of the padding token, or None.
        generation: which ids end a text: the tokenizer's, and generation_config.json's or, where that has none, config.json's; and sampling
            values that generation_config.json sets; ``do_sample`` is not read (as in vLLM).
        special_ids: ids of every special token: those that decoding leaves out. The text of a token that a file only calls special is guarded in
            chats as theirs is.
        vocab_size: one more than the largest id.
        splits_special: whether tokenizer_config.json says that special-token text in a prompt is no special token (``split_special_tokens``).
    """

    def __init__(self, library: tokenizers.Tokenizer, folder: TokenizerFolder):
        self._folder = folder
        library.no_truncation()  # some tokenizer.json keep the settings of a training run, which would cut or pad prompts
        library.no_padding()
        with border(f"{folder.path}: its vocabulary cannot be read"):
            self.special_ids, guarded_ids = add_missing_tokens(library, folder)
            added_ids = library.get_added_tokens_decoder().keys()
            self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        endings = ending_ids(folder.path, folder.config, folder.generation_config)
        self._guarded_ids = guarded_ids | (endings & added_ids)
        self._backend = Backend(library, self._guarded_ids)
        self.bos_token_id, self.pad_token_id, self._unk_id = (self._named_id(name) for name in ("bos_token", "pad_token", "unk_token"))
        self.eos_token_id = self._named_id("eos_token") if "eos_token" in folder.tokens.named else None
        self.generation = GenerationDefaults(endings | ({self.eos_token_id} - {None}), default_sampling(folder.path, folder.generation_config))
        self._adds_bos, self.splits_special = folder.flag("add_bos_token") is True, folder.flag("split_special_tokens") is True
        cleans_up, is_bpe = folder.flag("clean_up_tokenization_spaces") is True, type(library.model).__name__ == "BPE"
        self._cleans_up = cleans_up and (not is_bpe or folder.flag(ANYWAY) is True)
        with border(f"{folder.path}: its decoder cannot be read"):
            self._decoder_specs = decoder_specs(library.decoder)
            self.make_decoder_stages()

    @classmethod
    def from_folder(cls, path: pathlib.Path) -> Self:
        """The tokenizer of a Hugging Face folder.

        Raises:
            TokenizerError: tokenizer.json is missing or cannot be read, or a file beside it is damaged; it says what to do.
        """
        folder = read_folder(pathlib.Path(path))
        return cls(library_of(folder), folder)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a text."""
        return self.generation.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        """The chat template, as Jinja text; None where there is none of the usual name."""
        return self._folder.templates.get(DEFAULT_TEMPLATE)

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """Sampling values that the model's files recommend, named as in ``SamplingParams``."""
        return self.generation.sampling

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be given without tools."""
        return DEFAULT_TEMPLATE in self._folder.templates

    def with_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with another chat template."""
        other = copy.copy(self)
        other._folder = dataclasses.replace(self._folder, templates={DEFAULT_TEMPLATE: template})
        for name in ("_default_template", "_tool_template"):
            other.__dict__.pop(name, None)
        return other

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool | None = None) -> list[int]:
        """Ids of a prompt.

        Args:
            text: any text; an empty one gives at most the BOS.
            add_special_tokens: add BOS, and what else the tokenizer's post-processor adds. A BOS that the text itself begins with is not doubled.
            parse_special: read special-token text as special tokens; None does unless ``splits_special``, as in transformers.

        Raises:
            PromptError: not a text, or special-token text that this tokenizer cannot take as plain text.
        """
        checked_text(text, "the prompt")
        parse_special = not self.splits_special if parse_special is None else parse_special
        encoding = self._backend.encode(text) if parse_special else self._encode_plain(text)
        if not add_special_tokens:
            return encoding.ids
        bos, own = self.bos_token_id, encoding.ids
        ids = self._backend.post_process(encoding).ids
        if ids[:2] == [bos, bos] and ids[1:1 + len(own)] == own:
            return ids[1:]
        if self._adds_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def render_chat(self, messages: Sequence[Mapping], **options: Any) -> str:
        """The text that the model's chat template makes of messages; ``options`` as for :meth:`encode_chat`."""
        return str.__str__(self._render(messages, **options, is_traced=False))

    def encode_chat(self, messages: Sequence[Mapping], *, parse_special: bool = False, **options: Any) -> list[int]:
        """Ids of a chat under the model's chat template. Nothing is added to what the template writes.

        Args:
            messages: ``{"role": ..., "content": ...}``; content is a text or a list of ``{"type": "text", "text": ...}``.
            parse_special: read special-token text in messages, tools and template_kwargs as special tokens, as in transformers; the template's own
                always are.
            options: ``add_generation_prompt``: end with the header of the answer, which is the default unless ``continue_final_message``.
                ``continue_final_message``: end with the text of the last message, which the answer then goes on with.
                ``template_kwargs``: further variables of the template, such as ``enable_thinking``; they go before the tokenizer's own.
                ``tools``: JSON schemas of the functions that the model may call; left out, with a word in the log, where the template reads none.
                ``chat_template``: another template, as Jinja text.

        Raises:
            PromptError: malformed messages; it names the index and the fix.
            TokenizerError: no template, or one that fails or refuses the messages; it holds the template's message.
        """
        return self.chat_prompt(messages, parse_special=parse_special, **options)[1]

    def chat_prompt(self, messages: Sequence[Mapping], *, parse_special: bool = False, **options: Any) -> tuple[str, list[int]]:
        """The text of a chat and its ids; see :meth:`encode_chat`."""
        text = self._render(messages, **options, is_traced=not parse_special)
        checked_text(text, "the text that the chat template makes")
        plain = str.__str__(text)
        if parse_special:
            return plain, self._backend.encode(plain).ids
        return plain, encode_guarded(text, special_ids=self._guarded_ids, encode=self._backend.encode, special_span=self._special_span,
                                     encode_plain=self._encode_stretch)

    def decode(self, token_ids: int | Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of one id or several; ids outside the vocabulary have none, broken UTF-8 becomes U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = self._backend.decode([i for i in listed_ids(token_ids) if i not in skipped and 0 <= i < self.vocab_size])
        return run_stages(clean_up_stages(), [text], is_last=True) if self._cleans_up else text

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it, None for an id outside of it."""
        return self._backend.rust.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_id(self, piece: str) -> int | None:
        """Id of a token as the vocabulary writes it; for others that of the unknown token, or None."""
        found = self._backend.rust.token_to_id(piece)
        return self._unk_id if found is None else found

    def token_text(self, token_id: int) -> str:
        """A token's text as within a sentence, its leading space kept; U+FFFD for a part of a character."""
        piece = self.piece(token_id)
        if piece is None:
            return ""
        return run_stages(self.make_decoder_stages(), [_ANCHOR, piece], is_last=True).removeprefix(_ANCHOR)

    def make_decoder_stages(self) -> list[Stage]:
        """Fresh stages that turn pieces into text, for one text."""
        return [*make_stages(self._decoder_specs), *(clean_up_stages() if self._cleans_up else [])]

    def _named_id(self, name: str) -> int | None:
        """Id of a named special token; config.json is asked only where no file names the tokenizer's tokens."""
        names = self._folder.tokens.texts()
        if name in names:
            return self._backend.rust.token_to_id(names[name])
        ids = [] if self._folder.settings or names else self._folder.configured_ids(f"{name}_id")
        return ids[0] if ids else None

    def _render(self, messages: Sequence[Mapping], *, is_traced: bool, add_generation_prompt: bool | None = None,
                template_kwargs: Mapping | None = None, tools: Sequence[Mapping] | None = None, continue_final_message: bool = False,
                chat_template: str | None = None) -> TracedText:
        names = self._folder.tokens.texts()
        if continue_final_message and add_generation_prompt:
            raise PromptError("continue_final_message and add_generation_prompt are both true; one goes on with a message, the other begins one")
        add_generation_prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        template = self._template_for(tools) if chat_template is None else given_template(chat_template, tuple(names.values()))
        messages = checked_messages(with_taken_arguments(messages, lambda: template.argument_forms(names)))
        if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
            raise PromptError(f"tools is {short(tools)}; give a list of JSON schemas (dicts), or None")
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise PromptError(f"template_kwargs is {short(template_kwargs)}; give a dict such as {{'enable_thinking': False}}, or None")
        if "messages" in (template_kwargs or {}):
            raise PromptError("template_kwargs holds 'messages', which are the chat's own; leave it out, or give these as the messages")
        tools, given = plain_value(tools, "tools"), plain_value(template_kwargs or {}, "template_kwargs")
        if is_traced:
            framing = [*names.values(), *filter(None, map(self.piece, self.eos_token_ids))]
            messages, tools, given = traced_messages(messages, framing=framing), traced_value(tools), traced_value(given)
        context = {**names, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **given}
        text = template.render(messages, context)
        return up_to_last_message(text, messages) if continue_final_message else text

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
        encoding = self._backend.encode(text)
        if self._guarded_ids.isdisjoint(encoding.ids):
            return encoding
        encoding = self._backend.plain.encode(text)
        self._refuse_special(encoding.ids)
        return encoding

    def _encode_stretch(self, text: str, *, is_start: bool) -> list[int]:
        """Plain ids of a text that begins a prompt or follows a special token."""
        ids = (self._backend.plain if is_start else self._backend.following).encode(text).ids
        self._refuse_special(ids)
        return ids

    def _refuse_special(self, ids: list[int]) -> None:
        # Some models (Unigram) have their special tokens in the vocabulary that ordinary text is cut into.
        found = (self._guarded_ids - {self._unk_id}).intersection(ids)
        if found:
            raise PromptError(f"the prompt holds the text of the special token {self.piece(min(found))!r}, which this tokenizer cannot take "
                              "as plain text; remove it, or allow it with parse_special=True")

    def _special_span(self, token_id: int, offsets: tuple[int, int], text: str) -> tuple[int, int] | None:
        """Where a special token's own text stands: without white space that it takes from beside it. None where the unknown one stands for
        characters outside the vocabulary."""
        start, end = offsets
        span, piece = str.__getitem__(text, slice(start, end)), self.piece(token_id)
        if piece in span:
            start += span.index(piece)
            return start, start + len(piece)
        if token_id == self._unk_id:
            return None
        return start + len(span) - len(span.lstrip()), end - len(span) + len(span.rstrip())
