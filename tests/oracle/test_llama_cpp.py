"""The demo model in llama.cpp: the same token ids and the same greedy tokens."""
import pathlib

import numpy as np
import pytest

import tpllm
from tests.support.gguf_files import write_gguf
from tpllm import LLM, SamplingParams
from tpllm.checkpoint.folder import open_checkpoint

pytestmark = pytest.mark.oracle

DEMO = pathlib.Path(tpllm.__file__).parent / "demo"
TEXTS = ["def ", "import os\nimport sys\n", "class Foo(Bar):\n    \"\"\"Doc.\"\"\"\n\n\tx = 1\n", "naïve café — 你好 🙂\n",
         "    return  self.x[ 1:2 ]\r\n", "0x1F + 12_345 - 3.14e-10", "don't they'll WE'RE", "<|im_start|>"]

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The demo model, written as a float32 GGUF file and opened by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python comes with the oracle extra")
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    write_gguf(path, DEMO, "F32")
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, verbose=False, use_mmap=False, type_k=float32, type_v=float32)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_gives_the_same_token_ids(llama, text):
    from tpllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(open_checkpoint("demo").folder)
    assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text, parse_special=False)


def test_llama_cpp_gives_the_same_greedy_tokens(llama):
    llm = LLM("demo", mesh="tp=1", max_num_seqs=4, max_model_len=256)
    num_compared = 0
    for output in llm.generate(TEXTS[:5], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=2)):
        llama.reset()
        llama.eval(output.prompt_token_ids)
        for drawn, top in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
            first, second = sorted((entry.logprob for entry in top.values()), reverse=True)[:2]
            if first - second < 1e-3:
                break  # from a near tie on the rows may differ
            assert int(np.argmax(last_logits(llama))) == drawn
            llama.eval([drawn])
            num_compared += 1
    assert num_compared > 64


def last_logits(llama) -> np.ndarray:
    """[V] logits after the last token llama.cpp has read."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1), shape=(llama.n_vocab(),))
