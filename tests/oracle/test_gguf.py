"""GGUF files of llama.cpp's own quantizer: our log probabilities beside llama.cpp's on the same file and tokens.

llama.cpp multiplies quantized weights with quantized activations, so the two differ by that. How much it is, llama.cpp shows itself: on a file of
float32 that it made of the quantized one it quantizes no activations. There we must agree; on the quantized file we may be as far off as that is.
Where a row is no multiple of 256 its quantizer takes another type than asked for.
"""
import ctypes
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpllm
from sharding_rules import DATA_TENSOR, make_mesh
from tests.support.gguf_files import HF_LLAMA, write_gguf
from tools.demo_training.corpus import held_out_windows
from tpllm import LLM, SamplingParams, forward
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params, stored_schemes
from tpllm.model.partition import fit_to_mesh
from tpllm.tokenizer import Tokenizer
from tpllm.weights.storage import NATIVE, Storage

pytestmark = pytest.mark.oracle

DEMO = pathlib.Path(tpllm.__file__).parent / "demo"
KEPT = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]
K_TYPES = ["Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q2_K", "Q3_K_M", "IQ4_XS"]
"""Whose activations have one scale in 256."""
DENSE = ["F32", "F16", "BF16"]
DEQUANTIZED = ["Q2_K", "Q3_K_M", "IQ4_NL", "IQ4_XS"]
NUM_WINDOWS, WINDOW = 3, 128
QWEN2 = {**HF_LLAMA, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6}
QWEN3 = {**HF_LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 64}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True, "decoder_sparse_step": 1,
           "mlp_only_layers": []}
MIXTRAL = {**HF_LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
QWEN2_MOE = {**QWEN2, **EXPERTS, "architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": False, "shared_expert_intermediate_size": 512}
QWEN3_MOE = {**QWEN3, **EXPERTS, "architectures": ["Qwen3MoeForCausalLM"]}
GEMMA = {**HF_LLAMA, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 48,
          "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GEMMA3 = {**GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
          "sliding_window": 48, "num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 32, "rope_theta": 1e6,
          "rope_local_base_freq": 10000.0}
PHI3 = {**HF_LLAMA, "architectures": ["Phi3ForCausalLM"], "num_key_value_heads": 8, "pad_token_id": 0}
GPT_OSS = {**HF_LLAMA, "architectures": ["GptOssForCausalLM"], "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 3,
           "sliding_window": 24, "num_hidden_layers": 3, "intermediate_size": 256,
           "rope_parameters": {"rope_theta": 150000.0, "rope_type": "default"}}
FAMILIES = {"gemma": GEMMA, "gemma2": GEMMA2, "gemma3": GEMMA3, "phi3": PHI3}
MODELS = {**FAMILIES, "demo": DEMO, "llama": HF_LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "mixtral": MIXTRAL, "qwen2moe": QWEN2_MOE,
          "qwen3moe": QWEN3_MOE, "gpt-oss": GPT_OSS}


@functools.cache
def windows(model: str) -> np.ndarray:
    """Held-out text of the demo model, or random tokens of a random one: 384 positions."""
    if model == "demo":
        return np.stack(held_out_windows(Tokenizer.from_folder(DEMO)._backend.rust, WINDOW, NUM_WINDOWS, 0))[:, :-1]
    return np.random.default_rng(0).integers(0, 500, (NUM_WINDOWS, WINDOW - 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of a kind, made once."""
    return functools.cache(functools.partial(_make, tmp_path_factory.mktemp("gguf")))


def _make(folder, model, kind):
    path = folder / f"{model}-{kind}.gguf"
    write_gguf(path, MODELS[model], kind)
    return path


def theirs(path, tokens):
    """float64 [rows, T, V] log probabilities of llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python comes with the oracle extra")
    float32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(str(path), n_ctx=tokens.shape[1], n_threads=2, logits_all=True, verbose=False, use_mmap=False, type_k=float32,
                            type_v=float32)
    found = []
    for row in tokens.tolist():
        llama.reset()
        llama.eval(row)
        found.append(np.array(llama.scores[:len(row)], np.float64))
    return log_softmax(np.stack(found))


def dequantized(path):
    """The file's weights in float32, by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python comes with the oracle extra")
    target, params = path.with_suffix(".dequantized.gguf"), llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target


def ours(path, tokens, *, is_packed=True, **axes):
    """float64 [rows, T, V] log probabilities, and the parameters."""
    checkpoint = open_checkpoint(path)
    config = fit_to_mesh(checkpoint.config, make_mesh(axes), DATA_TENSOR)
    storage = Storage(np.dtype(np.float32), device=NATIVE if is_packed else None, stored=stored_schemes(find_entries(checkpoint, config), config))
    params = load_params(checkpoint, config, dtype=np.float32, storage=storage)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    logits = jax.jit(lambda params, tokens, positions: forward(params, tokens, positions, None, dataclasses.replace(config))[0])(
        params, jnp.asarray(tokens, jnp.int32), positions)
    return log_softmax(np.asarray(logits, np.float64)[..., :config.vocab_size]), params


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(found, expected):
    """(mean difference, share of equal best tokens, the same where the two best are clearly apart)."""
    best = np.sort(expected, -1)[..., -2:]
    is_clear = best[..., 1] - best[..., 0] > 0.1 * expected.std()
    agrees = found.argmax(-1) == expected.argmax(-1)
    return np.abs(found - expected).mean(), agrees.mean(), agrees[is_clear].mean()


@pytest.mark.parametrize("kind", [*DENSE, *KEPT, *DEQUANTIZED])
@pytest.mark.parametrize("model", ["demo", "llama"])
def test_log_probabilities_are_those_of_llama_cpp(files, model, kind):
    path, tokens = files(model, kind), windows(model)
    found, expected = ours(path, tokens)[0], theirs(path, tokens)
    if kind == "F32":
        exact = expected
    else:
        exact = theirs(dequantized(path), tokens)
        path.with_suffix(".dequantized.gguf").unlink()
    mean, share, clear = compare(found, exact)
    from_file, own = compare(found, expected), compare(exact, expected)
    print(model, kind, f"mean difference {mean:.5f}, equal best tokens {share:.3f}; on the quantized file {from_file[0]:.4f}, {from_file[1]:.3f}, "
          f"where clear {from_file[2]:.3f}; llama.cpp from itself {own[0]:.4f}, {own[1]:.3f}, {own[2]:.3f}")
    assert (mean < 1e-4, share, clear) == (True, 1, 1)
    assert from_file[0] <= own[0] + 1e-4
    if kind not in K_TYPES and model == "demo":
        assert (from_file[0] < 0.03, from_file[1] >= 0.975, from_file[2]) == (True, True, 1)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M", "Q6_K"])
@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
def test_other_architectures_too(files, model, kind):
    path, tokens = files(model, kind), windows(model)
    mean, _, clear = compare(ours(path, tokens)[0], theirs(path, tokens))
    assert (mean < 0.03, clear > 0.99) == (True, True)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("model", FAMILIES)
def test_families_with_features_of_their_own(files, model, kind):
    path, tokens = files(model, kind), windows(model)
    mean, share, clear = compare(ours(path, tokens)[0], theirs(path if kind == "F32" else dequantized(path), tokens))
    # llama.cpp looks GELU up in a table of float16; beside transformers Gemma's logits are equal within 1e-4 (test_transformers.py).
    most, least = (5e-3, 0.975) if "gemma" in model else (1e-4, 0.997)
    assert (mean < most, share >= least, clear) == (True, True, 1)


@pytest.mark.parametrize(("model", "kind"), [
    *((model, kind) for model in ("mixtral", "qwen2moe", "qwen3moe") for kind in ("F32", "Q8_0", "Q4_K_M", "Q3_K_M")),
    *(("gpt-oss", kind) for kind in ("F32", "Q8_0", "MXFP4"))])
def test_experts_in_one_tensor(files, model, kind):
    path, tokens = files(model, kind), windows(model)
    found, expected = ours(path, tokens)[0], theirs(path if kind == "F32" else dequantized(path), tokens)
    mean, _, clear = compare(found, expected)
    assert (mean < 1e-3, clear > 0.99) == (True, True)  # a token whose experts are nearly as good goes to others here and there
    for mesh in ({"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}):
        np.testing.assert_allclose(ours(path, tokens[:1], **mesh)[0], found[:1], atol=2e-4)


@pytest.mark.parametrize("kind", KEPT)
def test_meshes_and_the_canonical_layout_give_the_same(files, kind):
    path, tokens = files("demo", kind), windows("demo")[:1]
    alone = ours(path, tokens)[0]
    for tp, is_packed in ((1, False), (2, True), (4, True), (4, False)):
        np.testing.assert_allclose(ours(path, tokens, tp=tp, is_packed=is_packed)[0], alone, atol=2e-4)


@pytest.mark.parametrize("kind", KEPT)
def test_the_engine_gives_the_greedy_tokens_of_the_dequantized_weights(files, kind):
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    prompts = ["def ", "import os\n", "class Foo:\n    "]
    found = [LLM(str(files("demo", kind)), mesh="tp=1", dtype="float32", quantization=quantization, max_model_len=128).generate(
        prompts, params, use_tqdm=False) for quantization in (None, "none")]
    assert [output.outputs[0].token_ids for output in found[0]] == [output.outputs[0].token_ids for output in found[1]]
