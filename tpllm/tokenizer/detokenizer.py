"""Token ids to text as they come."""
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpllm.tokenizer.decoder_stages import run_stages

if TYPE_CHECKING:
    from tpllm.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Gives the text of a growing list of token ids, never half a character, in constant time a token.

    What the pushes and the end return, joined, is ``tokenizer.decode`` of all the ids. Text is held back only while a later token could
    change it: the bytes of an unfinished character, and with byte-fallback tokenizers the whole run of byte tokens until it ends.

    Args:
        tokenizer: whose ids they are.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: "Tokenizer", *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stages = tokenizer.make_decoder_stages()

    def push(self, token_ids: Sequence[int]) -> str:
        """Take more ids and return the text that has become certain; ids outside the vocabulary have no text."""
        pieces = [self._tokenizer.piece(int(token_id)) for token_id in token_ids if int(token_id) not in self._skipped]
        return run_stages(self._stages, [piece for piece in pieces if piece is not None])

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD; push nothing after it."""
        return run_stages(self._stages, [], is_last=True)
