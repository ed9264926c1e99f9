"""One stage of training on text and conversations: Muon (Jordan et al. 2024) for the layers' matrices, Adam for embedding and norms.

Compute is in bfloat16, weights are in float32.
"""
import dataclasses
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward
from tpllm.model.params import DecoderParams, init_params
from tpllm.tokenizer.tokenizer import Tokenizer

from .conversations import conversations, definitions, encode
from .corpus import BOS, documents, token_stream, train_tokenizer
from .models import DEMO, DRAFT, VOCAB_SIZE, Model, read_params, read_record, write_model, write_tokenizer

SHORT, LONG = 256, 1024  # tokens of a row: the end of a stage sees the whole context
LONG_FROM = 0.9
PEAK_LR, CONTINUED_PEAK_LR = 3e-3, 2e-3
BATCH_TOKENS = 2048
WARMUP_STEPS = 50
CHAT_SHARE = 0.4  # of the rows
NUM_PASSES = 3  # over the definitions, each with other questions


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of the training split.

    Attributes:
        text: documents, BOS to EOS, one after the other.
        chat: conversations, likewise.
        chat_starts: where each conversation begins.
    """

    text: np.ndarray
    chat: np.ndarray
    chat_starts: np.ndarray


def read_corpus(seed: int) -> Corpus:
    """The training split, under the demo's tokenizer."""
    tokenizer, rng = Tokenizer.from_folder(DEMO.folder), np.random.default_rng(seed)
    found = definitions(is_held_out=False)
    encoded = encode((one for _ in range(NUM_PASSES) for one in conversations(found, rng)), tokenizer)
    starts = np.cumsum([0, *(len(tokens) for tokens in encoded[:-1])])
    chat = np.concatenate(encoded)
    text = token_stream(tokenizers.Tokenizer.from_file(str(DEMO.folder / "tokenizer.json")), documents(is_held_out=False))
    return Corpus(text=text, chat=chat, chat_starts=starts[starts < len(chat) - LONG - 1])


def sample_batch(rng: np.random.Generator, corpus: Corpus, shape: tuple[int, int]) -> np.ndarray:
    """[B, T + 1] windows: of text, half of which open with BOS, so that it may come before anything, or from the start of a conversation."""
    is_chat = rng.random(shape[0]) < CHAT_SHARE
    offsets = np.arange(shape[1] + 1)
    text = corpus.text[rng.integers(0, len(corpus.text) - shape[1] - 1, shape[0])[:, None] + offsets]
    text[rng.random(shape[0]) < 0.5, 0] = BOS
    return np.where(is_chat[:, None], corpus.chat[rng.choice(corpus.chat_starts, shape[0])[:, None] + offsets], text)


@jax.custom_vjp
def product(x_D: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """``x @ weight.T`` in float32 of bfloat16 factors, and gradients of the same kind: XLA:CPU takes several times as long for any other."""
    return jax.lax.dot_general(x_D, weight_FD, (((x_D.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product_backward(factors, gradient_F):
    (x_D, weight_FD), gradient_F = factors, gradient_F.astype(jnp.bfloat16)
    x_gradient_D = jnp.einsum("...f,fd->...d", gradient_F, weight_FD, preferred_element_type=jnp.float32)
    weight_gradient_FD = jnp.einsum("btf,btd->fd", gradient_F, x_D, preferred_element_type=jnp.float32)
    return x_gradient_D.astype(x_D.dtype), weight_gradient_FD.astype(weight_FD.dtype)


product.defvjp(lambda x_D, weight_FD: (product(x_D, weight_FD), (x_D, weight_FD)), _product_backward)


def _linear(x_D: jax.Array, weight_FD: jax.Array, bias_F: None) -> jax.Array:
    """In place of ``tpllm.weights.linear``, whose products end in bfloat16, for the speed of :func:`product`."""
    return product(x_D, weight_FD).astype(x_D.dtype)


def logits_of(params: DecoderParams, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, T, V] float32, computed in bfloat16, as the models are stored."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with mock.patch("tpllm.model.attention.linear", _linear), mock.patch("tpllm.model.mlp.linear", _linear):
        hidden_BTD, _ = forward(half, tokens_BT, positions_BT, None, config, output="hidden")
    return product(hidden_BTD, half.embed)


def make_optimizer(params: DecoderParams):
    """Muon for the layers' matrices, Adam for embedding and norms, one learning rate set from outside at each step."""
    labels = jax.tree.map(lambda leaf: "adam" if leaf.ndim < 2 or leaf.shape[0] == VOCAB_SIZE else "muon", params)

    def make(learning_rate):
        muon = optax.contrib.muon(learning_rate, consistent_rms=0.2, weight_decay=0.02)
        return optax.chain(optax.clip_by_global_norm(1.0),
                           optax.partition({"muon": muon, "adam": optax.adam(learning_rate, b1=0.9, b2=0.98)}, labels))
    return optax.inject_hyperparams(make)(learning_rate=0.0)


def make_step(model: Model, optimizer):
    """``step(params, state, tokens, learning_rate) -> (params, state, loss)``."""
    def loss(params, tokens_BT):
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, tokens_BT[:, :-1], model.config()), tokens_BT[:, 1:]).mean()

    @jax.jit
    def step(params, state, tokens_BT, learning_rate):
        value, gradients = jax.value_and_grad(loss)(params, tokens_BT)
        state.hyperparams["learning_rate"] = learning_rate
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value
    return step


def first_params(model: Model, seed: int) -> DecoderParams:
    """Random weights, but the draft's embedding is the demo's, projected onto as many of its principal directions as the draft is wide."""
    params = init_params(model.config(), seed)
    if model is not DRAFT:
        return params
    left_VR, strengths_R, _ = jnp.linalg.svd(read_params(DEMO).embed, full_matrices=False)
    embed_VD = (left_VR * strengths_R)[:, :params.embed.shape[1]]
    return dataclasses.replace(params, embed=embed_VD * (params.embed.std() / embed_VD.std()))


def train(model: Model, minutes: float, *, seed: int, is_continued: bool) -> None:
    """One stage within a budget of time; the model's folder is written now and then, and at the end.

    Args:
        model: which one; the draft needs a demo that is there.
        minutes: of wall-clock time, compilation included.
        seed: of the first weights and of the order of the rows.
        is_continued: go on from the weights that are there, more gently, and add a stage to the record.
    """
    if not is_continued and model is DEMO:
        write_tokenizer(train_tokenizer(documents(is_held_out=False), VOCAB_SIZE))
    earlier = read_record(model)["stages"] if is_continued else []
    corpus, rng = read_corpus(seed), np.random.default_rng([seed, len(earlier)])  # each stage draws other rows
    params = read_params(model) if is_continued else first_params(model, seed)
    optimizer = make_optimizer(params)
    step, state = make_step(model, optimizer), optimizer.init(params)
    peak, num_params = CONTINUED_PEAK_LR if is_continued else PEAK_LR, sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{num_params / 1e6:.2f} M parameters, {len(corpus.text) / 1e6:.2f} M tokens of text, {len(corpus.chat) / 1e6:.2f} M of chats", flush=True)

    start, seen, steps, average, reported = time.monotonic(), 0, 0, None, 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = SHORT if progress < LONG_FROM else LONG
        learning_rate = peak * min(1.0, steps / WARMUP_STEPS, max(0.02, (1 - progress) / 0.6))
        params, state, loss = step(params, state, sample_batch(rng, corpus, (BATCH_TOKENS // length, length)), learning_rate)
        seen, steps = seen + BATCH_TOKENS, steps + 1
        average = float(loss) if average is None else 0.98 * average + 0.02 * float(loss)
        if progress - reported > 0.02:
            reported = progress
            print(f"{progress:5.0%}  step {steps}  {seen / 1e6:.2f} M tokens  loss {average:.3f}", flush=True)
            write_model(model, params, {"stages": [*earlier, _stage(seen, steps, minutes * progress, seed)]})
    write_model(model, params, {"stages": [*earlier, _stage(seen, steps, minutes, seed)]})


def _stage(num_tokens: int, num_steps: int, minutes: float, seed: int) -> dict:
    """What training.json says of one stage."""
    return {"tokens": num_tokens, "share_of_conversations": CHAT_SHARE, "steps": num_steps, "minutes": round(minutes, 1), "seed": seed}
