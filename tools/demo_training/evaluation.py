"""What the models are worth on held-out files: nats a token of text and of answers, how answers end, and how often the draft is right."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from tpllm import LLM, SamplingParams
from tpllm.tokenizer.tokenizer import Tokenizer

from .conversations import answer_mask, conversations, definitions, encode
from .corpus import EOS, PAD, TURN_END, held_out_windows
from .models import CONTEXT, DEMO, DRAFT, Model, read_params
from .training import logits_of

MAX_ANSWER_TOKENS = 200
ROW_LENGTH = 512  # no held-out conversation is longer


def evaluate(model: Model, *, num_windows: int, num_conversations: int, seed: int) -> None:
    """Measure a model and print it."""
    rows = {"text": text_rows(num_windows, seed), "answers": answer_rows(num_conversations, seed)}
    params = {one.folder: read_params(one) for one in (model, DEMO)}
    for what, (tokens_BT, is_counted_BT) in rows.items():
        nats, best = predict(params[model.folder], model, tokens_BT)
        mean = nats[is_counted_BT].mean()
        print(f"held-out {what}: {is_counted_BT.sum()} tokens measured: {mean:.4f} nats a token, perplexity {math.exp(mean):.2f}", flush=True)
        if model is DRAFT:
            _, demo_best = predict(params[DEMO.folder], DEMO, tokens_BT)
            agreement = (best == demo_best)[is_counted_BT].mean()
            print(f"held-out {what}: its best token is the demo's at {agreement:.1%} of these positions", flush=True)
    prompts = chat_prompts(num_conversations, seed)
    for how, sampling in (("greedy", {"temperature": 0.0}), ("sampled", {"temperature": 0.8, "top_p": 0.95})):
        print(f"{len(prompts)} held-out chats, {how}: {share_ended(model, prompts, sampling):.1%} end within {MAX_ANSWER_TOKENS} tokens")


def text_rows(num_windows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, T + 1] windows of the whole context, [B, T] bool: the tokens to count), BOS and EOS as targets not counted."""
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO.folder / "tokenizer.json"))
    tokens_BT = np.stack(held_out_windows(tokenizer, CONTEXT, num_windows, seed))
    return tokens_BT, tokens_BT[:, 1:] > EOS


def answer_rows(num_conversations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, T + 1] conversations, padded, [B, T] bool: the tokens of answers, each with its end)."""
    tokenizer = Tokenizer.from_folder(DEMO.folder)
    encoded = [tokens for tokens in encode(held_out_conversations(num_conversations, seed), tokenizer) if len(tokens) <= ROW_LENGTH]
    tokens_BT = np.full((len(encoded), ROW_LENGTH + 1), PAD, np.int32)
    for row_T, tokens in zip(tokens_BT, encoded, strict=True):
        row_T[:len(tokens)] = tokens
    return tokens_BT, np.stack([answer_mask(row_T, tokenizer)[1:] for row_T in tokens_BT])


def held_out_conversations(num_conversations: int, seed: int) -> list:
    """Conversations on definitions that training has not seen; small talk, which it has, is left out."""
    made = conversations(definitions(is_held_out=True), np.random.default_rng(seed), has_small_talk=False)
    return made[:num_conversations]


def chat_prompts(num_conversations: int, seed: int) -> list:
    """Held-out conversations up to their first answer."""
    made = held_out_conversations(num_conversations, seed)
    return [messages[:[message["role"] for message in messages].index("assistant")] for messages in made]


def predict(params, model: Model, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([B, T] nats of each next token, [B, T] the model's best one), row by row."""
    rows = [_predict_row(params, row_T[None], config=model.config()) for row_T in tokens_BT]
    return tuple(np.concatenate([np.asarray(row[index]) for row in rows]) for index in (0, 1))


@functools.partial(jax.jit, static_argnames="config")
def _predict_row(params, tokens_BT, *, config):
    logits_BTV = logits_of(params, tokens_BT[:, :-1], config)
    nats_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return nats_BT, jnp.argmax(logits_BTV, axis=-1)


def share_ended(model: Model, prompts: list, sampling: dict) -> float:
    """The share of answers that end with the turn's end within ``MAX_ANSWER_TOKENS``."""
    with LLM(model.folder, mesh="tp=1", max_num_seqs=16) as llm:
        params = [SamplingParams(max_tokens=MAX_ANSWER_TOKENS, seed=seed, **sampling) for seed in range(len(prompts))]
        outputs = llm.chat(prompts, params)
        ends = [output.outputs[0] for output in outputs]
        return float(np.mean([one.finish_reason == "stop" and one.token_ids[-1] == TURN_END for one in ends]))
