"""A stranger's own job: a folder that transformers saved, prompts and conversations in a file, and the same greedy text as transformers'.

The README's commands before it are run by ``make docs``, the notebooks by ``make notebooks``.
"""
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.tiny_models import LEAST_GAP

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install -e .[oracle]")
transformers = pytest.importorskip("transformers", reason="needs torch and transformers: pip install -e .[oracle]")

MAX_TOKENS = 24
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ROWS = (
    {"custom_id": "night", "prompt": "The night was long, and"},
    {"custom_id": "letters", "prompt": "Übung macht den Meister: 日本語 ", "source": "proverbs"},
    {"custom_id": "chat", "messages": [{"role": "user", "content": "Who is there? "}]},
    {"custom_id": "system", "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a mesh?"},
                                         {"role": "assistant", "content": "A grid."}, {"role": "user", "content": "Of what?"}]},
)


def make_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """A byte-level BPE of a few words that begins each text with BOS, and has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["the night was long and the mesh was a grid of devices", "who is there what is that short and long"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE,
                                                additional_special_tokens=special[2:])


def make_model(vocab_size: int) -> "transformers.LlamaForCausalLM":
    """A Llama of random weights, large enough for its greedy tokens to differ."""
    torch.manual_seed(3)  # two of the rows end with EOS
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.2, bos_token_id=0, eos_token_id=1)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Where the stranger works: a model saved by transformers in ``my-model``, rows and a job."""
    folder = tmp_path_factory.mktemp("stranger")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "my-model")
    make_model(len(tokenizer)).save_pretrained(folder / "my-model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    (folder / "job.yaml").write_text("model: my-model\ninput: rows.jsonl\noutput: answers\n"
                                     f"sampling: {{temperature: 0, max_tokens: {MAX_TOKENS}}}\nengine: {{max_num_seqs: 3}}\n")
    return folder


def tpllm(folder: pathlib.Path, *words: str) -> str:
    """What the command prints on standard output, run as a stranger runs it: on the one device that a CPU is."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([pathlib.Path(sys.executable).with_name("tpllm"), *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def answer(model, tokenizer, row) -> tuple[list[int], str]:
    """transformers' own greedy tokens and text for a row; their best logits are clearly the best."""
    if "messages" in row:
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    else:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, output_logits=True,
                         return_dict_in_generate=True, pad_token_id=1)
    gaps = [float(best[0] - best[1]) for best in (torch.topk(logits[0], 2).values for logits in out.logits)]
    assert min(gaps) > LEAST_GAP, "another seed of the weights decides the tokens clearly"
    tokens = out.sequences[0, ids.shape[1]:].tolist()
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_saved_model_can_be_looked_at(folder):
    printed = tpllm(folder, "inspect", "my-model")
    assert "Llama" in printed
    report = json.loads(tpllm(folder, "inspect", "my-model", "--json"))
    assert report["num_parameters"] == make_model(report["config"]["vocab_size"]).num_parameters()


def test_a_job_on_a_saved_model_gives_the_greedy_text_of_transformers(folder):
    tpllm(folder, "run", "job.yaml")
    rows = [json.loads(line) for line in (folder / "answers" / "part-00000.jsonl").read_text().splitlines()]
    assert not list((folder / "answers").glob("*.errors.jsonl"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "my-model", dtype="float32", attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "my-model")
    for given, row in zip(ROWS, rows, strict=True):
        tokens, text = answer(model, tokenizer, given)
        completion, = row["outputs"]
        assert (completion["token_ids"], completion["text"]) == (tokens, text)
        assert {key: row[key] for key in given} == given
