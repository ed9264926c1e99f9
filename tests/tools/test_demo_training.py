"""How the demo and its draft are trained, at toy sizes."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.demo_training.corpus import BOS, EOS, TURN
from tools.demo_training.models import DEMO, DRAFT, MODELS, read_params, write_model
from tools.demo_training.training import Corpus, first_params, logits_of, make_optimizer, make_step, product, sample_batch
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.model.decoder import forward
from tpllm.model.params import init_params

TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture
def toy(tmp_path):
    return dataclasses.replace(DRAFT, folder=tmp_path, sizes=TOY)


def toy_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(5, 200, (2, 17)).astype(np.int32)


def test_a_model_is_read_as_it_was_written_and_opens_as_a_checkpoint(toy):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), init_params(toy.config(), 0))
    write_model(toy, params, {"stages": []})
    jax.tree.map(np.testing.assert_array_equal, read_params(toy), params)
    checkpoint = open_checkpoint(toy.folder)
    assert checkpoint.config == toy.config()
    assert (toy.folder / "tokenizer.json").read_bytes() == (DEMO.folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_packages_configs_are_those_that_the_tool_writes(name):
    assert dict(open_checkpoint(MODELS[name].folder).hf_config) == MODELS[name].hf_config()


def test_the_logits_in_training_are_the_models_own_up_to_bfloat16(toy):
    params = init_params(toy.config(), 0)
    positions_BT = jnp.broadcast_to(jnp.arange(17), (2, 17))
    expected, _ = forward(params, toy_tokens(), positions_BT, None, toy.config())
    logits = logits_of(params, toy_tokens(), toy.config())
    assert np.std(logits - expected) < 0.03 * np.std(expected)


def test_the_products_gradients_are_those_of_the_exact_product_up_to_bfloat16():
    rng = np.random.default_rng(0)
    x, weight, pull = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 5, 16), (8, 16), (2, 5, 8)))

    def gradients(multiply, dtype):
        total = jax.grad(lambda x, weight: (multiply(x, weight).astype(jnp.float32) * pull.astype(jnp.float32)).sum(), argnums=(0, 1))
        return total(x.astype(dtype), weight.astype(dtype))
    exact = gradients(lambda x, weight: jnp.einsum("btd,fd->btf", x, weight, precision="highest"), jnp.float32)
    for ours, theirs in zip(gradients(product, jnp.bfloat16), exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0.01, atol=0.01)


def test_a_batch_mixes_text_and_whole_starts_of_conversations():
    text = np.tile(np.array([BOS, 10, 11, 12, EOS], np.int32), 40)
    chat = np.tile(np.array([BOS, TURN, 20, 21, EOS], np.int32), 40)
    corpus = Corpus(text=text, chat=chat, chat_starts=np.arange(0, 100, 5))
    rows = np.concatenate([sample_batch(np.random.default_rng(seed), corpus, (16, 9)) for seed in range(20)])
    is_chat = (rows == TURN).any(axis=1)
    assert 0.2 < is_chat.mean() < 0.4
    assert (rows[is_chat] == chat[:10]).all()
    assert not np.isin(rows[~is_chat], [20, 21]).any()
    assert 0.5 <= (rows[~is_chat, 0] == BOS).mean() < 0.8


@jax.numpy_dtype_promotion("standard")  # optax relies on it
def test_training_steps_lower_the_loss(toy):
    params = init_params(toy.config(), 0)
    optimizer = make_optimizer(params)
    step, state = make_step(toy, optimizer), optimizer.init(params)
    losses = []
    for _ in range(30):
        params, state, loss = step(params, state, toy_tokens(), 3e-3)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(4096), abs=0.3)
    assert losses[-1] < losses[0] - 0.5


def test_the_drafts_first_embedding_keeps_which_tokens_the_demo_holds_for_alike():
    embeds = [np.asarray(params.embed) for params in (read_params(DEMO), first_params(DRAFT, seed=0), init_params(DRAFT.config(), 0))]

    def cosines(embed_VD):
        unit_VD = embed_VD / np.linalg.norm(embed_VD, axis=-1, keepdims=True)
        return (unit_VD[:500] @ unit_VD[500:1000].T).ravel()
    of_demo, of_draft, at_random = map(cosines, embeds)
    assert np.corrcoef(of_demo, of_draft)[0, 1] > 0.7
    assert abs(np.corrcoef(of_demo, at_random)[0, 1]) < 0.1
    assert embeds[1].std() == pytest.approx(embeds[2].std(), rel=1e-3)
