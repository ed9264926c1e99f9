"""Train the demo model that ships in ``tpllm/demo`` on the Python standard library's own source.

    python tools/train_demo.py --minutes 60            # writes tpllm/demo/
    python tools/train_demo.py --evaluate              # held-out nats a token of what is there

One document is one top-level definition (or the run of statements between two): BOS, text, EOS. A tenth of the files, by a hash of their
path, is held out. Matrices are trained with Muon (Jordan et al. 2024), the rest with Adam; compute in bfloat16, weights in float32.
"""
import argparse
import ast
import hashlib
import itertools
import json
import math
import pathlib
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tpllm.families.llama import FAMILY
from tpllm.model.decoder import forward
from tpllm.model.params import init_params, named_leaves

DEMO = pathlib.Path(__file__).parents[1] / "tpllm" / "demo"
BOS, EOS, PAD, TURN, TURN_END = range(5)
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEFT_OUT = {"site-packages", "encodings", "pydoc_data", "__pycache__"}  # packages that are not the library's; tables, not code
SHORT, LONG = (8, 256), (2, 1024)  # (rows, tokens) of a batch: the last fifth of the training sees the whole context
LONG_FROM, PEAK_LR = 0.8, 3e-3


def documents(*, is_held_out: bool) -> list[str]:
    """Every document of one split, in the order of their files."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or (hashlib.sha256(str(name).encode()).digest()[0] < 26) != is_held_out:
            continue
        try:
            text = path.read_text("utf-8")
            found.extend(top_level_pieces(text))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # files that test the parser's errors
    return found


def top_level_pieces(text: str) -> list[str]:
    """A module cut before each top-level definition and after its end."""
    lines, cuts = text.splitlines(keepends=True), {0}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            cuts |= {first - 1, node.end_lineno}
    bounds = sorted(cuts | {len(lines)})
    pieces = ("".join(lines[start:end]).strip("\n") for start, end in itertools.pairwise(bounds))
    return [piece + "\n" for piece in pieces if piece.strip()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenization, which every runtime knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=HF_CONFIG["vocab_size"], special_tokens=SPECIALS, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIALS[BOS]} $A", pair=f"{SPECIALS[BOS]} $A {SPECIALS[BOS]} $B",
                                                             special_tokens=[(SPECIALS[BOS], BOS)])
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """BOS, document, EOS, BOS, document, EOS, ..."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([BOS, *encoding.ids, EOS], np.int32) for encoding in encoded])


def sample_batch(rng: np.random.Generator, stream: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[B, T + 1] windows; half of them open with BOS, so that it may come before anything."""
    starts = rng.integers(0, len(stream) - shape[1] - 1, shape[0])
    tokens = stream[starts[:, None] + np.arange(shape[1] + 1)]
    tokens[rng.random(shape[0]) < 0.5, 0] = BOS
    return tokens


def token_losses(params, tokens_BT, config):
    """[B, T-1] nats of each next token; the first token of a row only conditions."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1] - 1), (tokens_BT.shape[0], tokens_BT.shape[1] - 1))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits, _ = forward(half, tokens_BT[:, :-1], positions, None, config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:])


def make_optimizer(params):
    """Muon for the layers' matrices, Adam for embedding and norms, one learning rate set from outside at each step."""
    labels = jax.tree.map(lambda leaf: "adam" if leaf.ndim < 2 or leaf.shape[0] == HF_CONFIG["vocab_size"] else "muon", params)

    def make(learning_rate):
        muon = optax.contrib.muon(learning_rate, consistent_rms=0.2, weight_decay=0.02)
        return optax.chain(optax.clip_by_global_norm(1.0),
                           optax.partition({"muon": muon, "adam": optax.adam(learning_rate, b1=0.9, b2=0.98)}, labels))
    return optax.inject_hyperparams(make)(learning_rate=0.0)


def train(minutes: float, seed: int) -> None:
    """Train within a budget of time and write the demo folder now and then, and at the end."""
    DEMO.mkdir(exist_ok=True)
    config = FAMILY.config_from_hf(HF_CONFIG)
    tokenizer = train_tokenizer(documents(is_held_out=False))
    write_tokenizer(tokenizer)
    stream = token_stream(tokenizer, documents(is_held_out=False))
    params = init_params(config, seed)
    optimizer = make_optimizer(params)
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M tokens", flush=True)

    @jax.jit
    def step(params, state, tokens_BT, learning_rate):
        loss, grads = jax.value_and_grad(lambda p: token_losses(p, tokens_BT, config).mean())(params)
        state.hyperparams["learning_rate"] = learning_rate
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    start, seen, steps, average, reported = time.monotonic(), 0, 0, 9.0, 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        shape = SHORT if progress < LONG_FROM else LONG
        learning_rate = PEAK_LR * min(1.0, steps / 100, max(0.02, (1 - progress) / 0.6))
        params, state, loss = step(params, state, sample_batch(rng, stream, shape), learning_rate)
        seen, steps, average = seen + shape[0] * shape[1], steps + 1, 0.98 * average + 0.02 * float(loss)
        if progress - reported > 0.02:
            reported = progress
            print(f"{progress:5.0%}  step {steps}  {seen / 1e6:.2f} M tokens  loss {average:.3f}", flush=True)
            write_model(params, {"train_tokens": seen, "steps": steps, "minutes": round(minutes * progress, 1), "seed": seed})
    write_model(params, {"train_tokens": seen, "steps": steps, "minutes": minutes, "seed": seed})


def write_tokenizer(tokenizer: Tokenizer) -> None:
    tokenizer.save(str(DEMO / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS], "pad_token": SPECIALS[PAD],
                "additional_special_tokens": SPECIALS[TURN:], "model_max_length": HF_CONFIG["max_position_embeddings"],
                "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    (DEMO / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_model(params, record: dict) -> None:
    """Weights in bfloat16 under Hugging Face's names, the configs, and how they were made."""
    tensors = {FAMILY.checkpoint_name(name): np.asarray(leaf.astype(jnp.bfloat16)) for name, leaf in named_leaves(params)}
    save_file(tensors, DEMO / "model.safetensors.tmp", metadata={"format": "pt"})
    (DEMO / "model.safetensors.tmp").chmod(0o644)
    (DEMO / "model.safetensors.tmp").replace(DEMO / "model.safetensors")
    (DEMO / "config.json").write_text(json.dumps(HF_CONFIG, indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, TURN_END], "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (DEMO / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (DEMO / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def read_model():
    """(parameters in float32, config) of the demo folder."""
    from safetensors.numpy import load_file

    config = FAMILY.config_from_hf(json.loads((DEMO / "config.json").read_text()))
    tensors = load_file(DEMO / "model.safetensors")
    template = jax.eval_shape(lambda: init_params(config, 0))
    leaves = [jnp.asarray(tensors[FAMILY.checkpoint_name(name)].astype(np.float32)) for name, _ in named_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), config


def evaluate(num_windows: int, seed: int) -> float:
    """Mean nats a token on held-out text: windows of the whole context, BOS and EOS as targets not counted."""
    params, config = read_model()
    losses = jax.jit(lambda params, tokens: token_losses(params, tokens, config))
    total, count = 0.0, 0
    for tokens_T in held_out_windows(Tokenizer.from_file(str(DEMO / "tokenizer.json")), config.max_position, num_windows, seed):
        is_text_T = tokens_T[1:] > EOS
        total += float(np.where(is_text_T, losses(params, tokens_T[None])[0], 0).sum())
        count += int(is_text_T.sum())
    print(f"held-out: {count} tokens measured: {total / count:.4f} nats a token, perplexity {math.exp(total / count):.2f}")
    return total / count


def held_out_windows(tokenizer: Tokenizer, length: int, num_windows: int, seed: int) -> list[np.ndarray]:
    """Some of the held-out text's windows: ``length`` tokens to predict, after one that only conditions."""
    stream = token_stream(tokenizer, documents(is_held_out=True))
    starts = np.random.default_rng(seed).permutation(np.arange(0, len(stream) - length - 1, length))[:num_windows]
    return [stream[start:start + length + 1] for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="budget of the training, in minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="measure the model that is there instead of training one")
    parser.add_argument("--windows", type=int, default=200, help="how many held-out windows of 1024 tokens to measure")
    arguments = parser.parse_args()
    if not arguments.evaluate:
        train(arguments.minutes, arguments.seed)
    evaluate(arguments.windows, seed=0)


if __name__ == "__main__":
    main()
