"""Text to token ids and back: special tokens, chat templates, streaming."""
from tpllm.tokenizer.detokenizer import Detokenizer
from tpllm.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
