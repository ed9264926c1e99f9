"""Tokens that files beside tokenizer.json hold: tokenizer_config.json, special_tokens_map.json and added_tokens.json."""
import logging

import tokenizers

from tpllm.tokenizer.backend import border
from tpllm.tokenizer.folder import TokenizerFolder

log = logging.getLogger("tpllm")


def add_missing_tokens(library: tokenizers.Tokenizer, folder: TokenizerFolder) -> None:
    """Give a tokenizer the tokens that only other files know.

    As in transformers, a new token gets the next free id. One whose file names another id is left out, for that id's row in the model is another
    token's: that is said in the log.
    """
    with border(f"{folder.path}: its added tokens cannot be read"):
        _add_numbered(library, folder)
        _add_named(library, folder)


def _add_numbered(library: tokenizers.Tokenizer, folder: TokenizerFolder) -> None:
    left_out, added = [], library.get_added_tokens_decoder()
    for token_id, token in folder.numbered_tokens().items():
        known = library.token_to_id(token.content)
        if known != token_id and (known is not None or token_id != library.get_vocab_size(with_added_tokens=True)):
            left_out.append(f"{token.content} ({token_id})")
        elif token_id not in added or (folder.lists_added and repr(added[token_id]) != repr(token)):  # its flags go before tokenizer.json's
            (library.add_special_tokens if token.special else library.add_tokens)([token])
    if left_out:
        log.warning("%s: %d added tokens have ids that are another token's or leave a gap; they are left out: %s", folder.path, len(left_out),
                    ", ".join(left_out[:5]))


def _add_named(library: tokenizers.Tokenizer, folder: TokenizerFolder) -> None:
    """Tokens with a name are special; so are the others that a file calls special, unless they are tokens already."""
    added = {token.content: token for token in library.get_added_tokens_decoder().values()}
    names = folder.special_names()
    ignored = {text for name, text in names.items() if name in folder.ignored_names}
    for text, token in folder.special_tokens().items():
        if text in added and (added[text].special or text not in names.values()):
            continue
        if text in added:  # its flags stay, it only becomes special
            old = added[text]
            token = tokenizers.AddedToken(text, single_word=old.single_word, lstrip=old.lstrip, rstrip=old.rstrip, normalized=old.normalized,
                                          special=True)
        if library.token_to_id(text) is not None or text not in ignored:
            library.add_special_tokens([token])
            added[text] = token
