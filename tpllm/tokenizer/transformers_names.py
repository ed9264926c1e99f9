"""What transformers' tokenizers can do, under its names, so that scripts for them go on."""
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpllm.errors import PromptError, short


class BatchEncoding(dict):
    """``input_ids`` and ``attention_mask``, of one text or one list each of several; its keys are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"there is no {name!r}; there is {' and '.join(self)}")
        return self[name]


class TransformersNames:
    """The methods of transformers' tokenizers that are made of those of :class:`.Tokenizer`."""

    def __len__(self) -> int:
        """One more than the largest id; added tokens count."""
        return self.vocab_size

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> BatchEncoding:
        """Ids of one text, or of several.

        Args:
            text: one, or a list of them; nothing is padded or cut.
            add_special_tokens: as for :meth:`.Tokenizer.encode`.
        """
        if isinstance(text, str):
            return _encoding(self.encode(text, add_special_tokens=add_special_tokens))
        return _encoding([self.encode(one, add_special_tokens=add_special_tokens) for one in text])

    def batch_decode(self, sequences: Iterable[Iterable[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """Texts of several lists of ids."""
        return [self.decode(token_ids, skip_special_tokens=skip_special_tokens) for token_ids in sequences]

    def apply_chat_template(self, conversation: Sequence[Any], tools: Sequence[Mapping] | None = None, *, chat_template: str | None = None,
                            add_generation_prompt: bool = False, continue_final_message: bool = False, tokenize: bool = True,
                            return_dict: bool = True, **template_kwargs: Any) -> str | list[Any] | BatchEncoding:
        """A chat, or a list of chats, as text or ids. Special-token text in messages stays text, unlike in transformers.

        Args:
            conversation: messages, or a list of lists of them.
            tools, chat_template, continue_final_message: as for :meth:`.Tokenizer.encode_chat`.
            add_generation_prompt: end with the header of the answer.
            tokenize: ids rather than text.
            return_dict: ids as :class:`BatchEncoding` rather than a list.
            template_kwargs: further variables of the template.
        """
        options = {"tools": tools, "chat_template": chat_template, "add_generation_prompt": add_generation_prompt,
                   "continue_final_message": continue_final_message, "template_kwargs": template_kwargs}
        make = self.encode_chat if tokenize else self.render_chat
        is_batch = isinstance(conversation, list | tuple) and bool(conversation) and isinstance(conversation[0], list | tuple)
        made = [make(messages, **options) for messages in conversation] if is_batch else make(conversation, **options)
        return _encoding(made) if tokenize and return_dict else made

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str | None] | None:
        """Tokens as the vocabulary writes them; None for an id outside of it."""
        return self.piece(int(ids)) if isinstance(ids, numbers.Integral) else [self.piece(int(token_id)) for token_id in ids]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """Ids of tokens as the vocabulary writes them; that of the unknown token, or None, for others."""
        return self.token_id(tokens) if isinstance(tokens, str) else [self.token_id(token) for token in tokens]

    @property
    def bos_token(self) -> str | None:
        """Text of ``bos_token_id``."""
        return self._text_of(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        """Text of ``eos_token_id``."""
        return self._text_of(self.eos_token_id)

    @property
    def pad_token(self) -> str | None:
        """Text of ``pad_token_id``."""
        return self._text_of(self.pad_token_id)

    def _text_of(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.piece(token_id)


def listed_ids(token_ids: Any) -> list[int]:
    """One id, or several, as a list of them.

    Raises:
        PromptError: no whole numbers.
    """
    try:
        return [int(token_ids)] if isinstance(token_ids, numbers.Integral) else [operator.index(token_id) for token_id in token_ids]
    except TypeError:
        raise PromptError(f"the token ids are {short(token_ids)}; give whole numbers") from None


def _encoding(ids: list[Any]) -> BatchEncoding:
    mask = [[1] * len(one) for one in ids] if ids and isinstance(ids[0], list) else [1] * len(ids)
    return BatchEncoding(input_ids=ids, attention_mask=mask)
