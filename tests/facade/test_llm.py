"""The facade on the bundled demo model."""
import dataclasses
import re
import shutil
import subprocess
import sys

import jax
import pytest
from jax.sharding import Mesh

import tpllm
from sharding_rules import MeshError
from tpllm import LLM, SamplingParams
from tpllm.checkpoint.source import DEMO_FOLDER
from tpllm.engine import admission
from tpllm.errors import ConfigError, PromptError, SamplingError, TpllmError

GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", mesh="tp=1", max_num_seqs=4, max_model_len=256) as llm:
        yield llm


def test_importing_tpllm_imports_nothing_heavy():
    code = "import sys, tpllm, tpllm.cli.main, tpllm.jobs.runner; assert not {'jax', 'torch', 'transformers', 'flax'} & set(sys.modules)"
    code += "; tpllm.LLM; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_facade_has_at_most_eight_names_and_each_is_there():
    assert len(set(tpllm.__all__) - {"__version__"}) <= 8
    assert all(getattr(tpllm, name) is not None for name in tpllm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tpllm.nothing


def test_text_is_what_the_tokens_decode_to(llm):
    output = llm.generate("import os\n", GREEDY)[0]
    assert output.prompt == "import os\n"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("import os\n")
    assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)
    assert output.outputs[0].text


def test_streamed_text_joins_to_the_generated_text(llm):
    params = SamplingParams(seed=3, max_tokens=40)
    assert "".join(delta.text for delta in llm.stream("def f(x):\n", params)) == llm.generate("def f(x):\n", params)[0].outputs[0].text


def test_a_progress_bar_is_shown_on_standard_error_when_asked_for(llm, capsys):
    llm.generate(["import os\n", "x ="], GREEDY, use_tqdm=True)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["import os\n", "x ="], GREEDY)
    assert capsys.readouterr().err == ""


def test_a_stop_tokens_text_is_left_out_but_its_id_is_kept(llm):
    free = llm.generate("import os\n", GREEDY)[0].outputs[0]
    stop = free.token_ids[5]
    ended = llm.generate("import os\n", dataclasses.replace(GREEDY, stop_token_ids=[stop]))[0].outputs[0]
    assert ended.token_ids[-1] == stop
    assert ended.text == llm.get_tokenizer().decode(ended.token_ids[:-1])


@pytest.mark.parametrize("is_included", [False, True])
def test_a_stop_string_across_token_boundaries_ends_the_row_where_it_stands(llm, is_included):
    free = llm.generate("import os\n", GREEDY)[0].outputs[0]
    pieces = [llm.get_tokenizer().decode([token]) for token in free.token_ids]
    first = next(index for index in range(2, 12) if pieces[index].strip() and pieces[index + 1].strip())
    stop = pieces[first][-1] + pieces[first + 1][0]  # the end of one token and the beginning of the next
    params = dataclasses.replace(GREEDY, stop=["never there", stop], include_stop_str_in_output=is_included)
    ended = llm.generate("import os\n", params)[0].outputs[0]
    at = free.text.index(stop)
    assert ended.text == free.text[:at + len(stop) * is_included]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.token_ids == free.token_ids[:len(ended.token_ids)]
    assert len(ended.token_ids) < len(free.token_ids)
    assert "".join(delta.text for delta in llm.stream("import os\n", params)) == ended.text


def test_a_stop_string_is_not_looked_for_before_min_tokens(llm):
    free = llm.generate("import os\n", GREEDY)[0].outputs[0]
    stop = free.text[0]
    ended = llm.generate("import os\n", dataclasses.replace(GREEDY, stop=stop, min_tokens=5))[0].outputs[0]
    assert len(ended.token_ids) > 5
    assert llm.generate("import os\n", dataclasses.replace(GREEDY, stop=stop))[0].outputs[0].text == ""


def test_rows_with_stop_strings_leave_their_neighbours_alone(llm):
    prompts = ["import os\n", "def f(", "class A", "x =", "for i in"] * 2
    free = llm.generate(prompts, GREEDY)
    mixed = llm.generate(prompts, [dataclasses.replace(GREEDY, stop=["e", "\n"]) if index % 2 else GREEDY for index in range(10)])
    for index, (alone, together) in enumerate(zip(free, mixed, strict=True)):
        expected = re.split("e|\n", alone.outputs[0].text)[0] if index % 2 else alone.outputs[0].text
        assert together.outputs[0].text == expected


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(llm):
    eos = min(llm.get_tokenizer().eos_token_ids)
    many = [{"prompt_token_ids": llm.get_tokenizer().encode("x = 1\n")}] * 4
    options = {"max_tokens": 16, "skip_special_tokens": False, "ignore_eos": True, "logit_bias": {eos: 5.0}}
    params = [SamplingParams(seed=seed, **options) for seed in range(4)]
    shown = llm.generate(many, params)
    hidden = llm.generate(many, [dataclasses.replace(one, skip_special_tokens=True) for one in params])
    assert any(eos in output.outputs[0].token_ids for output in shown)
    for with_specials, without in zip(shown, hidden, strict=True):
        assert with_specials.outputs[0].token_ids == without.outputs[0].token_ids
        assert "<|eos|>" not in without.outputs[0].text
        assert ("<|eos|>" in with_specials.outputs[0].text) == (eos in with_specials.outputs[0].token_ids)


def test_generators_left_half_read_say_nothing_when_the_interpreter_ends():
    code = ("from tpllm import LLM, SamplingParams; llm = LLM('demo', mesh='tp=1', max_num_seqs=4, max_model_len=256)\n"
            "rows = llm.generate_iter(['def f'] * 3, SamplingParams(max_tokens=20)); next(rows)\n"
            "deltas = llm.stream('def f', SamplingParams(max_tokens=20)); next(deltas)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "Exception ignored" not in done.stderr


def test_without_a_tokenizer_a_folder_serves_token_ids(llm, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    prompt = {"prompt_token_ids": llm.get_tokenizer().encode("import os\n")}
    expected = llm.generate(prompt, GREEDY)[0].outputs[0]
    with LLM(str(tmp_path), skip_tokenizer_init=True, mesh="tp=1", max_num_seqs=4, max_model_len=256) as other:
        found = other.generate(prompt, GREEDY)[0].outputs[0]
        assert (found.token_ids, found.text) == (expected.token_ids, "")
        assert other.default_sampling == llm.default_sampling
        ended = other.generate(prompt, SamplingParams(max_tokens=50, logit_bias={min(llm.get_tokenizer().eos_token_ids): 100.0}))[0].outputs[0]
        assert (ended.finish_reason, len(ended.token_ids)) == ("stop", 1)
        with pytest.raises(TpllmError, match="no tokenizer; give the prompt as"):
            other.generate("import os\n", GREEDY)
    with pytest.raises(TpllmError, match="skip_tokenizer_init=True"):
        LLM(str(tmp_path), mesh="tp=1")


def test_without_parameters_the_models_own_defaults_are_used(llm):
    assert llm.default_sampling == {"temperature": 0.8, "top_p": 0.95}
    messages = [{"role": "user", "content": "hello"}]
    output = llm.chat(messages, SamplingParams(**llm.default_sampling, seed=1, max_tokens=5))[0]
    assert output.prompt_token_ids == llm.get_tokenizer().encode_chat(messages)
    assert len(llm.chat([messages, messages], GREEDY)) == 2
    unfinished = llm.chat(messages, GREEDY, add_generation_prompt=False)[0]
    assert unfinished.prompt_token_ids == llm.get_tokenizer().encode_chat(messages, add_generation_prompt=False) != output.prompt_token_ids


def test_tools_that_the_template_does_not_know_of_change_nothing(llm):
    tools, messages = [{"type": "function", "function": {"name": "now", "parameters": {}}}], [{"role": "user", "content": "What time is it?"}]
    with_tools, without = (llm.chat(messages, GREEDY, tools=value)[0] for value in (tools, None))
    assert with_tools.prompt_token_ids == without.prompt_token_ids


def test_generate_refuses_a_bad_parameter_of_a_late_prompt_before_it_begins(llm):
    before = llm._engine._num_requests
    with pytest.raises(SamplingError, match="logit_bias names token id 4096"):
        llm.generate(["x ="] * 3, [GREEDY, GREEDY, SamplingParams(logit_bias={4096: 1.0})])
    assert llm._engine._num_requests == before


@pytest.mark.parametrize("mesh", ["tp=4", {"dp": 2, "tp": 2}, "auto"], ids=str)
def test_every_way_to_name_a_mesh_gives_the_same_greedy_text(llm, mesh):
    with LLM("demo", mesh=mesh, max_num_seqs=4, max_model_len=256) as other:
        assert other.generate("import os\n", GREEDY)[0].outputs[0].text == llm.generate("import os\n", GREEDY)[0].outputs[0].text
        assert other.config.partition.mesh.devices.size == (8 if mesh == "auto" else 4)


def test_a_jax_mesh_with_a_tp_axis_alone_serves(llm):
    mesh = Mesh(jax.devices()[:2], ("tp",))
    with LLM("demo", mesh=mesh, max_num_seqs=4, max_model_len=256) as other:
        assert other.generate("import os\n", GREEDY)[0].outputs[0].text == llm.generate("import os\n", GREEDY)[0].outputs[0].text


def test_the_functional_layer_generates_what_the_engine_does(llm):
    import jax.numpy as jnp

    config, params, tokenizer = tpllm.load_model("demo", "tp=2")
    ids = tokenizer.encode("import os\n")
    cache = tpllm.init_cache(config, 1, 64)
    step = jax.jit(tpllm.forward, static_argnums=4, donate_argnums=3)
    tokens, position, drawn = jnp.array([ids]), 0, []
    for _ in range(8):
        positions = position + jnp.arange(tokens.shape[1])[None]
        logits, cache = step(params, tokens, positions, cache, config)
        position += tokens.shape[1]
        tokens = jnp.argmax(logits[:, -1:], axis=-1)
        drawn.append(int(tokens[0, 0]))
    assert drawn == llm.generate("import os\n", GREEDY)[0].outputs[0].token_ids[:8]


@pytest.mark.parametrize(("mesh", "error", "words"), [
    ("tp=16", MeshError, "needs 16 devices but 8"), ("xp=2", MeshError, "unknown axis 'xp'"), ("tp=0", MeshError, "least is 1"),
    ("tp=two", MeshError, "whole number"), ("tp=5", ValueError, "vocab|mlp"),
])
def test_a_mesh_that_cannot_be_is_refused(mesh, error, words):
    with pytest.raises(error, match=words):
        LLM("demo", mesh=mesh)


@pytest.mark.parametrize(("options", "words"), [({"dtype": "int7"}, "int7"), ({"max_model_len": 2000}, "context is 1024")])
def test_a_bad_option_is_refused_with_its_value(options, words):
    with pytest.raises(ConfigError, match=words):
        LLM("demo", mesh="tp=1", **options)


@pytest.mark.parametrize("prompt", ["", {"prompt": ""}, {"prompt": 3}, {"messages": []}, ["fine", ""]], ids=str)
def test_an_empty_or_malformed_prompt_is_refused_before_anything_runs(llm, prompt):
    with pytest.raises(PromptError):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(("values", "words"), [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("nan")}, "nan"), ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.5}, "at most 1"),
    ({"n": 0}, "from 1 to 128"), ({"n": 129}, "from 1 to 128"), ({"logprobs": -2}, "from -1 to"), ({"prompt_logprobs": True}, "True"),
    ({"top_k": -2}, "top_k is -2"), ({"min_p": 2}, "min_p is 2"), ({"max_tokens": 0}, "max_tokens is 0"), ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "none of them empty"), ({"stop": ["a", ""]}, "none of them empty"), ({"stop": 3}, "stop is 3"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5"), ({"stop_token_ids": "ab"}, "list of token ids"), ({"stop_token_ids": [-1]}, "-1"),
    ({"stop_token_ids": list(range(65))}, "65 ids; the most is 64"), ({"n": True}, "True"), ({"temperature": "hot"}, "'hot'"),
])
def test_a_sampling_value_out_of_range_is_named_with_its_limits(values, words):
    with pytest.raises(SamplingError, match=words) as caught:
        SamplingParams(**values)
    assert isinstance(caught.value, TpllmError)
    assert isinstance(caught.value, ValueError)


def test_each_prompt_may_bring_its_own_parameters(llm):
    one, two = SamplingParams(temperature=0, max_tokens=2), SamplingParams(temperature=0, max_tokens=5)
    given, numbers = [("The sea", two), "A ship", ("Once", two), "So"], [5, 2, 5, 2]
    assert [len(output.outputs[0].token_ids) for output in llm.generate(given, one)] == numbers
    iterated = {int(output.request_id): output for output in llm.generate_iter(iter(given), one)}
    assert [len(iterated[index].outputs[0].token_ids) for index in range(4)] == numbers
    assert len(llm.generate([("So", one)])[0].outputs[0].token_ids) == 2
    returned = list(llm.generate_iter([("", one), ("So", "greedy")], on_error="return"))
    assert [output.outputs[0].finish_reason for output in returned] == ["error", "error"]
    assert "the sampling parameters are 'greedy'" in returned[1].outputs[0].error


@pytest.mark.parametrize("wrong", [{}, "", 0, False, []], ids=repr)
def test_what_is_no_parameters_is_refused_and_not_taken_for_none(llm, wrong):
    for ask in (lambda: llm.generate([("So", wrong)]), lambda: list(llm.generate_iter([("So", wrong)])), lambda: llm.generate(["So"], [wrong]),
                lambda: list(llm.stream("So", wrong)), lambda: llm.submit("0", "So", wrong)):
        with pytest.raises(SamplingError, match=re.escape(f"the sampling parameters are {wrong!r}")):
            ask()


def test_a_prompt_is_encoded_and_checked_once(llm, monkeypatch):
    calls, tokenizer = [], llm.get_tokenizer()
    encode, find = tokenizer.encode, admission.find_bad_words
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: calls.append(text) or encode(text, **options))
    monkeypatch.setattr(admission, "find_bad_words", lambda *args, **options: calls.append("check") or find(*args, **options))
    params = SamplingParams(temperature=0, max_tokens=1)
    llm.generate(["The sea", "A ship"], params)
    assert calls == ["The sea", "check", "A ship", "check"]
    calls.clear()
    list(llm.generate_iter(["So"], params))
    assert calls == ["So", "check"]
