"""What config.json leaves out, sets to null or says twice means what transformers' config classes make of it: by the resulting ModelConfig."""
import copy
import random

import pytest

from tpllm.errors import ConfigError
from tpllm.families.registry import FAMILIES

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[oracle]")

NUM_MIXED = 300
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 77.0}
TINY = {"num_hidden_layers": [3], "num_attention_heads": [8], "hidden_size": [64], "num_key_value_heads": [None, 2, 8]}
"""Sizes that fit one another, so that the other fields decide."""
VALUES = {
    "head_dim": [None, 16], "hidden_act": ["relu", "gelu"], "hidden_activation": ["relu"], "max_position_embeddings": [99, 4096],
    "rms_norm_eps": [1e-3, 1], "norm_epsilon": [1e-3], "tie_word_embeddings": [True, False], "rope_theta": [50.0, 1000],
    "rope_local_base_freq": [60.0], "rope_parameters": [None, {}, LINEAR, YARN],
    "rope_scaling": [None, {}, LINEAR, YARN, {"type": "linear", "factor": 3.0}],
    "original_max_position_embeddings": [256], "attention_bias": [True, False], "mlp_bias": [True, False], "qkv_bias": [True, False],
    "use_bias": [True, False], "sliding_window": [None, 9], "use_sliding_window": [True, False], "max_window_layers": [0, 1, 2, 28],
    "layer_types": [None, ["full_attention", "sliding_attention", "full_attention"]], "sliding_window_pattern": [2],
    "no_rope_layers": [None, [0, 1, 1]], "no_rope_layer_interval": [2], "attn_logit_softcapping": [None, 5.0],
    "final_logit_softcapping": [None, 6.0], "query_pre_attn_scalar": [11], "embedding_multiplier": [2, 3.0],
    "attention_multiplier": [0.5], "residual_multiplier": [0.25], "logits_scaling": [4.0], "swiglu_limit": [3.0], "swiglu_alpha": [1.5],
    "num_experts": [4], "num_local_experts": [5], "num_experts_per_tok": [1, 3], "moe_intermediate_size": [24],
    "shared_expert_intermediate_size": [40], "norm_topk_prob": [True, False], "decoder_sparse_step": [1, 2], "mlp_only_layers": [None, [1]],
    "use_bidirectional_attention": [False],
}
NESTED = {"rope_parameters": [None, {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 33.0}},
                              {"full_attention": {"rope_type": "default", "rope_theta": 44.0}}],
          "rope_scaling": [None, LINEAR, {"type": "linear", "factor": 3.0}]}
"""Where each kind of layer has a rule of its own."""


def explicit(family, hf):
    """config.json with every field that transformers' class fills in, or None where it refuses the file."""
    try:
        config = transformers.AutoConfig.for_model(family.model_type, **copy.deepcopy(hf))
        config.standardize_rope_params()  # as a model's rotary embedding does before it reads them
    except Exception:  # its validators raise kinds of their own
        return None
    return config.to_dict()


def read(family, hf):
    return family.config_from_hf({"architectures": list(family.architectures), "model_type": family.model_type, **copy.deepcopy(hf)})


def values_of(family):
    keys = {*family.defaults, *family.aliases}
    values = {**VALUES, **(NESTED if "rope_local_base_freq" in family.defaults else {})}
    if family.model_type == "phi3":
        rule = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        values |= {"rope_parameters": [None, {}, rule], "rope_scaling": [None, {}, {**rule, "rope_type": "longrope"}], "head_dim": [None]}
    return {**TINY, **{key: choices for key, choices in values.items() if key in keys}}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_empty_file_is_the_class_without_arguments(family):
    assert read(family, {}) == read(family, explicit(family, {}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_key_that_transformers_takes_as_null_means_the_same_here_and_no_other_is_guessed(family):
    lenient = {"num_key_value_heads", "head_dim"}  # one KV head a head, an even split: the shapes of the weights show whether that is right
    taken = []
    for key in sorted(family.defaults):
        filled = explicit(family, {key: None})
        if filled is not None and not _is_lost(family, key):
            assert read(family, {key: None}) == read(family, filled), key
            taken.append(key)
        elif key not in lenient and refuses(family, {key: {"no": "value"}}):  # it is read, of a file with no other key
            assert refuses(family, {key: None}), key
    assert "rope_parameters" in taken


def refuses(family, hf):
    try:
        read(family, hf)
    except ConfigError as error:
        return next(iter(hf)) in str(error)
    return False


def _is_lost(family, key):
    """Whether transformers takes a null for the class's attribute, and its model cannot be made of it."""
    return key in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern", "head_dim", "original_max_position_embeddings")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_fields_that_are_there_left_out_and_there_twice_read_alike(family):
    rng, values, compared = random.Random(family.name), values_of(family), 0
    for _ in range(NUM_MIXED):
        hf = {key: choices[0] for key, choices in TINY.items() if key != "num_key_value_heads"}
        hf |= {key: rng.choice(values[key]) for key in rng.sample(sorted(values), rng.randint(0, len(values)))}
        filled = explicit(family, hf)
        if filled is None:
            continue
        try:
            expected = read(family, filled)
        except ConfigError:  # a combination that we do not run, however it is written
            with pytest.raises(ConfigError):
                read(family, hf)
            continue
        assert read(family, hf) == expected, hf
        compared += 1
    assert compared > NUM_MIXED // 10
