"""Tokens that files beside tokenizer.json hold: tokenizer_config.json, special_tokens_map.json and added_tokens.json."""

import tokenizers

from tpllm.errors import log
from tpllm.tokenizer.backend import border
from tpllm.tokenizer.folder import TokenizerFolder
from tpllm.tokenizer.token_files import SPECIAL_NAMES, text_of


def add_missing_tokens(library: tokenizers.Tokenizer, folder: TokenizerFolder) -> tuple[frozenset[int], frozenset[int]]:
    """Give a tokenizer the tokens that only other files know, and the flags that they give to its own.

    As in transformers, a new token gets the next free id. One whose file names another id is left out, for that id's row in the model is another
    token's: that is said in the log.

    Returns:
        (ids that the library skips as special, which a token stays that was one before; those and all others that a file calls special).
    """
    with border(f"{folder.path}: its added tokens cannot be read"):
        files, before = folder.tokens, library.get_added_tokens_decoder()
        numbered = dict(files.numbered) if files.is_listed else {**files.numbered, **before}
        by_text = {token.content: token for token in numbered.values()}
        named = [by_text.get(text_of(token), token) if name in SPECIAL_NAMES else token for name, token in files.named.items()]
        tokens = _placed(library, numbered, folder)
        known = {token.content for token in before.values()} | by_text.keys()
        for token in (*named, *files.others):
            if text_of(token) not in known and token not in tokens:
                tokens.append(token)
        texts = set(map(text_of, named))
        library.add_tokens([_as_token(token, texts) for token in tokens])
        added = library.get_added_tokens_decoder()
        special = {token_id for token_id, token in (*before.items(), *added.items()) if token.special}
        skipped = frozenset(token_id for token_id in special if library.id_to_token(token_id) == added[token_id].content)
        called = {library.token_to_id(text_of(token)) for token in (*named, *files.others)}
        return skipped, frozenset(special | (called & added.keys()))


def _placed(library: tokenizers.Tokenizer, numbered: dict[int, tokenizers.AddedToken], folder: TokenizerFolder) -> list[tokenizers.AddedToken]:
    """Tokens that have an id, or get the one that their file names."""
    placed, left_out, free = [], [], library.get_vocab_size(with_added_tokens=True)
    for token_id, token in sorted(numbered.items()):
        is_new = library.token_to_id(token.content) is None
        if is_new and token_id != free:
            left_out.append(f"{token.content} ({token_id})")
        else:
            placed.append(token)
            free += is_new
    if left_out:
        log.warning("%s: %d added tokens have ids that are another token's or leave a gap; they are left out: %s", folder.path, len(left_out),
                    ", ".join(left_out[:5]))
    return placed


def _as_token(token: str | tokenizers.AddedToken, named: set[str]) -> tokenizers.AddedToken:
    """A token with a name is special, and so is one that is only a text."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if token.content in named:
        token.special = True
    return token
