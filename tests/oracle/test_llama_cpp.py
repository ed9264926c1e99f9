"""The demo model in llama.cpp: the same token ids and the same greedy tokens."""
import json
import pathlib

import numpy as np
import pytest

import tpllm
from tpllm import LLM, SamplingParams
from tpllm.checkpoint import open_checkpoint

pytestmark = pytest.mark.oracle

DEMO = pathlib.Path(tpllm.__file__).parent / "demo"
TEXTS = ["def ", "import os\nimport sys\n", "class Foo(Bar):\n    \"\"\"Doc.\"\"\"\n\n\tx = 1\n", "naïve café — 你好 🙂\n",
         "    return  self.x[ 1:2 ]\r\n", "0x1F + 12_345 - 3.14e-10", "don't they'll WE'RE", "<|im_start|>"]
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The demo model, written as a float32 GGUF file and opened by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python comes with the oracle extra")
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    write_gguf(path)
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, verbose=False, use_mmap=False, type_k=float32, type_v=float32)


def write_gguf(path: pathlib.Path) -> None:
    """The demo model as GGUF (llama's layout: the halves of a head's query and key dims interleaved)."""
    import gguf
    from safetensors import safe_open

    hf = json.loads((DEMO / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_vocab_size(hf["vocab_size"])
    _add_tokenizer(writer)
    with safe_open(DEMO / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():
            values = tensors.get_tensor(name).float().numpy()
            if "q_proj" in name or "k_proj" in name:
                heads = hf["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                values = values.reshape(heads, 2, hf["head_dim"] // 2, -1).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer) -> None:
    import gguf

    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    specials = {added["content"] for added in tokenizer["added_tokens"] if added["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL if token in specials else gguf.TokenType.NORMAL for token, _ in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_gives_the_same_token_ids(llama, text):
    from tpllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(open_checkpoint("demo").folder)
    assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)


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
