"""The bundled model: what it knows, and that it is small."""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpllm
from tools.train_demo import EOS, documents, token_stream
from tpllm import LLM, SamplingParams

FOLDER = pathlib.Path(tpllm.__file__).parent / "demo"


def test_the_demo_folder_leaves_room_for_a_draft_model():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25e6


def test_its_sizes_fit_every_quantized_format():
    config, params, _ = tpllm.load_model("demo", "tp=1")
    assert 5e6 <= sum(leaf.size for leaf in jax.tree.leaves(params)) <= 12e6
    assert config.hidden_size % 256 == 0
    assert config.intermediate_size % 256 == 0
    assert config.head_dim == 64
    assert config.vocab_size == 4096


@pytest.mark.slow
def test_it_has_learnt_the_standard_librarys_code():
    from tokenizers import Tokenizer

    config, params, _ = tpllm.load_model("demo", "tp=1")
    stream = token_stream(Tokenizer.from_file(str(FOLDER / "tokenizer.json")), documents(is_held_out=True))
    length = config.max_position
    windows = np.stack([stream[start:start + length + 1] for start in range(0, len(stream) - length - 1, len(stream) // 24)])

    @jax.jit
    def nats(tokens_BT):
        positions = jnp.broadcast_to(jnp.arange(length), (tokens_BT.shape[0], length))
        logits, _ = tpllm.forward(params, tokens_BT[:, :-1], positions, None, config)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BT[:, 1:, None], axis=-1)[..., 0]
    losses = np.concatenate([np.asarray(nats(windows[at:at + 1])) for at in range(len(windows))])
    is_text = windows[:, 1:] > EOS
    assert losses[is_text].mean() < 3.3


def test_it_ends_its_documents():
    with LLM("demo", mesh="tp=1", max_num_seqs=8) as llm:
        outputs = llm.generate(["x = 1\n"] * 8, [SamplingParams(seed=seed, max_tokens=400, temperature=0.8) for seed in range(8)])
        assert sum(output.outputs[0].finish_reason == "stop" for output in outputs) >= 3
