"""``tpllm`` as its process begins it, on the fake engine, for tests that send signals at any moment; with ``TPLLM_TEST_IMPORTS=all`` it imports what
the real engine does, which takes seconds."""
import os
import sys

from tpllm.cli import entry

if __name__ == "__main__":
    entry.end_at_once()
    from types import SimpleNamespace

    if os.environ.get("TPLLM_TEST_IMPORTS"):
        import tpllm.llm  # noqa: F401
    from tests.jobs.fake_llm import FakeLLM

    class Engine(FakeLLM):
        """With what a dry run asks for."""

        def __init__(self, model, *, max_num_seqs=4, tick_s=0.0, calls=None, **options):
            super().__init__(model, max_num_seqs=max_num_seqs, tick_s=tick_s, calls=calls, **options)
            self.shapes, self.config = SimpleNamespace(max_num_seqs=max_num_seqs, max_model_len=64), SimpleNamespace(vocab_size=1000)

        def get_tokenizer(self):
            return SimpleNamespace(splits_special=False, encode=lambda text, **_: [1, 2, 3], chat_prompt=lambda messages, **_: ("", [1, 2, 3]))
    sys.exit(entry.main(make_llm=Engine))
