"""The two models in the package: their sizes, and their folders in Hugging Face's layout."""
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tpllm.families.llama import FAMILY
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, init_params, named_leaves

from .corpus import BOS, EOS, PAD, SPECIALS, TURN, TURN_END

PACKAGE = pathlib.Path(__file__).parents[2] / "tpllm"
VOCAB_SIZE, CONTEXT = 4096, 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models.

    Attributes:
        folder: where it lies.
        sizes: what differs in its config.json.
    """

    folder: pathlib.Path
    sizes: dict[str, int]

    def hf_config(self) -> dict[str, Any]:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, **self.sizes,
                "max_position_embeddings": CONTEXT, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
                "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "torch_dtype": "bfloat16"}

    def config(self) -> ModelConfig:
        return FAMILY.config_from_hf(self.hf_config())


DEMO = Model(PACKAGE / "demo", {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 8,
                                "num_key_value_heads": 4, "head_dim": 64})
# As many query heads as the demo, so that the same meshes split it; few layers, because a draft is worth as much as it is quick.
DRAFT = Model(PACKAGE / "demo_draft", {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8,
                                       "num_key_value_heads": 2, "head_dim": 32})
MODELS = {"demo": DEMO, "draft": DRAFT}


def write_tokenizer(tokenizer: Tokenizer) -> None:
    """The demo's tokenizer, with the chat template."""
    DEMO.folder.mkdir(exist_ok=True)
    tokenizer.save(str(DEMO.folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS], "pad_token": SPECIALS[PAD],
                "additional_special_tokens": SPECIALS[TURN:], "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE}
    (DEMO.folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_model(model: Model, params: DecoderParams, record: dict) -> None:
    """Weights in bfloat16 under Hugging Face's names, the configs, and how they were made; the demo's tokenizer beside any other model."""
    model.folder.mkdir(exist_ok=True)
    tensors = {FAMILY.checkpoint_name(name): np.asarray(leaf.astype(jnp.bfloat16)) for name, leaf in named_leaves(params)}
    written = model.folder / "model.safetensors.tmp"
    save_file(tensors, written, metadata={"format": "pt"})
    written.chmod(0o644)
    written.replace(model.folder / "model.safetensors")
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, TURN_END], "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    for name, content in (("config.json", model.hf_config()), ("generation_config.json", generation), ("training.json", record)):
        (model.folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if model is not DEMO:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO.folder / name, model.folder / name)


def read_params(model: Model) -> DecoderParams:
    """A model's parameters as they are stored, in float32."""
    tensors = load_file(model.folder / "model.safetensors")
    template = jax.eval_shape(lambda: init_params(model.config(), 0))
    leaves = [jnp.asarray(tensors[FAMILY.checkpoint_name(name)].astype(np.float32)) for name, _ in named_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def read_record(model: Model) -> dict:
    """training.json."""
    return json.loads((model.folder / "training.json").read_text())
