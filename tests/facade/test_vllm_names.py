"""vLLM's names on the bundled demo model: arguments, calls, parameters and methods."""
import inspect
import logging

import jax
import numpy as np
import pytest

import tpllm
from sharding_rules import ONE_DEVICE
from tpllm import LLM, SamplingParams
from tpllm.checkpoint.source import DEMO_FOLDER
from tpllm.errors import ConfigError, PromptError, SamplingError, TokenizerError, TpllmError
from tpllm.loading import choose_cache_dtype, choose_dtype
from tpllm.metrics_reader import Counter, Gauge, Histogram
from tpllm.model_files import ModelFiles
from tpllm.names import Renamed, Same
from tpllm.names.vllm import ARGUMENTS, CALLS, METHODS, SAMPLING, TYPES

SHAPES = {"max_num_seqs": 4, "max_model_len": 256}
GREEDY = SamplingParams(temperature=0, max_tokens=4)
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", mesh="tp=1", **SHAPES) as llm:
        yield llm


def ids_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


# --- the arguments of LLM ----------------------------------------------------------------------------------------------------------------
def test_every_name_that_the_tables_call_ours_is_there():
    parameters = inspect.signature(LLM).parameters
    assert {name for name, one in ARGUMENTS.items() if isinstance(one, Same | Renamed)} <= parameters.keys()
    assert {one.ours for one in ARGUMENTS.values() if isinstance(one, Renamed)} <= parameters.keys()
    calls = {*inspect.signature(LLM.generate).parameters, *inspect.signature(LLM.chat).parameters}
    assert {name for name, one in CALLS.items() if isinstance(one, Same | Renamed)} <= calls
    assert {name for name, one in SAMPLING.items() if isinstance(one, Same)} <= inspect.signature(SamplingParams).parameters.keys()
    assert all(hasattr(LLM, name) == isinstance(one, Same) for name, one in METHODS.items())
    assert all(hasattr(tpllm, name) == isinstance(one, Same) for name, one in TYPES.items())


def test_sizes_under_vllms_names_are_those_of_ours(llm, caplog):
    with caplog.at_level(logging.INFO, "tpllm"):
        other = LLM("demo", tensor_parallel_size=1, pipeline_parallel_size=1, gpu_memory_utilization=0.9, max_num_batched_tokens=300, block_size=16,
                    enforce_eager=True, swap_space=4, disable_log_stats=True, trust_remote_code=False, device="cpu", load_format="auto",
                    enable_prefix_caching=None, hf_overrides={}, limit_mm_per_prompt={"image": 0}, **SHAPES)
    with other:
        assert (other.shapes.prefill_chunk, other.shapes.page_size) == (256, 16)
        assert dict(other.config.partition.mesh.shape) == {"dp": 1, "tp": 1}
        assert other.engine.scheduler.pools[0].num_pages == 4 * 256 // 16
        assert ids_of(other.generate("import os\n", GREEDY)) == ids_of(llm.generate("import os\n", GREEDY))
    lines = [record.message for record in caplog.records]
    for name in ("enforce_eager", "swap_space", "disable_log_stats", "limit_mm_per_prompt"):
        assert sum(line.startswith(f"{name}=") and "has no effect: " in line for line in lines) == 1


def test_parallel_sizes_are_axes_of_the_mesh_and_blocks_are_tokens_of_the_cache():
    with LLM("demo", tensor_parallel_size=2, data_parallel_size=2, num_gpu_blocks_override=5, **SHAPES) as other:
        assert dict(other.config.partition.mesh.shape) == {"dp": 2, "tp": 2}
        assert sum(pool.num_pages for pool in other.engine.scheduler.pools) == 10


@pytest.mark.parametrize(("options", "words"), [
    ({"tensor_parallel_size": 2, "mesh": "tp=4"}, "tensor_parallel_size is 2 and mesh is 'tp=4', which say the same thing"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be a whole number of at least 1"),
    ({"max_num_batched_tokens": 8}, "max_num_batched_tokens is 8; it must be a whole number of at least 16"),
    ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2, which is not supported; .* use tensor_parallel_size"),
    ({"trust_remote_code": True}, "trust_remote_code is True, which is not supported; code .* is never run"),
    ({"device": "tpu"}, "JAX_PLATFORMS"), ({"enable_lora": True}, "merge the adapter"), ({"task": "embed"}, "models here generate text"),
    ({"gpu_memory_utilization": 2}, "gpu_memory_utilization is 2; it must be above 0 and at most 1"),
    ({"gpu_memory_utilization": 0.5, "memory_share": 0.5}, "give one of them"), ({"max_logprobs": -2}, "max_logprobs is -2"),
    ({"gpu_memory_utilisation": 0.5}, "no argument 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'"),
    ({"n_ctx": 512}, "llama.cpp calls so what is here `max_model_len`"), ({"hf_overrides": 3}, "hf_overrides is 3"),
    ({"quantization": "awq"}, "quantization is 'awq', the name of a checkpoint's format, but 'demo' holds plain weights"),
    ({"tokenizer_revision": "main"}, "tokenizer_revision is 'main', without a tokenizer"),
    ({"skip_tokenizer_init": True, "tokenizer": "demo"}, "leave one of them out"), ({"generation_config": "/none"}, "no generation_config.json is"),
    ({"override_generation_config": {"temp": 1}}, "override_generation_config is {'temp': 1}"), ({"dtype": np.int8}, "dtype is "),
    ({"chat_template": "nowhere.jinja"}, "neither Jinja text nor a file"),
])
def test_what_cannot_be_is_refused_with_what_to_use(options, words):
    with pytest.raises(TpllmError, match=words):
        LLM("demo", **options)


def test_an_unknown_option_of_from_params_names_the_nearest(llm):
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM.from_params(llm.config, llm.params, max_num_seq=3)


def test_values_of_the_configuration_are_overridden_one_by_one():
    options = {"hf_overrides": {"rope_theta": 5000.0, "max_position_embeddings": 128}, "override_generation_config": {"max_new_tokens": 3},
               "dtype": jax.numpy.bfloat16, "quantization": None, "seed": None}
    with LLM("demo", mesh="tp=1", max_num_seqs=4, **options) as other:
        assert other.shapes.max_model_len == 128
        assert other.default_sampling == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 3}
        assert other.get_default_sampling_params() == SamplingParams(temperature=0.8, top_p=0.95, max_tokens=3)
        assert other.fingerprint()["model"]["hf_overrides"] == options["hf_overrides"]
        assert isinstance(other.seed, int)


def test_where_sampling_defaults_come_from_does_not_change_what_ends_a_text(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 3}')
    found = {name: ModelFiles(generation_config=name).open("demo")[2] for name in ("auto", "vllm", str(tmp_path))}
    assert [dict(one.sampling) for one in found.values()] == [{"temperature": 0.8, "top_p": 0.95}, {}, {"top_k": 3}]
    assert [sorted(one.eos_token_ids) for one in found.values()] == [[1, 4], [1, 4], [1, 7]]


def test_a_tokenizer_and_a_template_may_be_others_than_the_models(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    _, tokenizer, generation = ModelFiles(tokenizer="demo-draft", chat_template=str(template)).open("demo")
    assert tokenizer.render_chat(HI) == "[hi]"
    assert generation.eos_token_ids == {1, 4}
    with_other, alone = (files.open("demo")[0].reads.below(DEMO_FOLDER) for files in (ModelFiles(tokenizer="demo-draft"), ModelFiles()))
    assert any("demo_draft" in name for name in with_other)
    assert not any("demo_draft" in name for name in alone)


def test_hub_options_reach_its_client(monkeypatch):
    import huggingface_hub
    asked = []

    def record(repo_id, **options):
        asked.append((repo_id, options["revision"], options["token"], options["cache_dir"]))
        raise RuntimeError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    with pytest.raises(TpllmError, match="offline"):
        LLM("owner/model", revision="v1", hf_token="secret", download_dir="/data")
    with pytest.raises(TpllmError, match="offline"):
        LLM("demo", tokenizer="owner/other", tokenizer_revision="v2", hf_token="secret")
    assert asked == [("owner/model", "v1", "secret", "/data"), ("owner/other", "v2", "secret", None)]


# --- calls -----------------------------------------------------------------------------------------------------------------------------
def test_every_form_of_prompts_gives_the_same_tokens(llm):
    texts = ["import os\n", "x ="]
    ids = [llm.get_tokenizer().encode(text) for text in texts]
    expected = ids_of(llm.generate(texts, GREEDY))
    forms = [np.array(texts), tuple(texts), iter(texts), ids, [np.array(one) for one in ids], [{"prompt": text} for text in texts],
             [(tuple(one), GREEDY) for one in ids], [tpllm.TextPrompt(prompt=text) for text in texts],
             [tpllm.TokensPrompt(prompt_token_ids=one) for one in ids]]
    assert all(ids_of(llm.generate(form, GREEDY)) == expected for form in forms)
    assert ids_of(llm.generate(prompt_token_ids=ids, sampling_params=GREEDY)) == expected
    single = [ids[0], tuple(ids[0]), np.array(ids[0]), texts[0], {"prompt_token_ids": ids[0]}]
    assert all(ids_of(llm.generate(form, GREEDY, False)) == expected[:1] for form in single)
    assert ids_of(llm.generate(prompt_token_ids=ids[0], sampling_params=GREEDY)) == ids_of(llm(texts[0], GREEDY)) == expected[:1]
    assert ids_of(sorted(llm.generate_iter(np.array(texts), GREEDY), key=lambda output: output.request_id)) == expected
    assert [delta.token_ids for delta in llm.stream(ids[0], GREEDY) if delta.token_ids] != []
    assert llm.generate([], GREEDY) == []


def test_a_pandas_series_is_a_list_of_prompts_and_outputs_are_a_table(llm):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"prompt": ["import os\n", "x ="]})
    outputs = llm.generate(table["prompt"], SamplingParams(temperature=0, max_tokens=4, n=2))
    found = outputs.to_pandas()
    assert list(found["prompt"]) == ["import os\n"] * 2 + ["x ="] * 2
    assert list(found["text"]) == [completion.text for output in outputs for completion in output.outputs]
    assert list(found["index"]) == [0, 1, 0, 1]
    assert list(found["num_prompt_tokens"]) == [len(output.prompt_token_ids) for output in outputs for _ in range(2)]
    with pytest.raises(PromptError, match=r"prompts is a table with the columns \['prompt'\]; give one of them"):
        llm.generate(table, GREEDY)
    with pytest.raises(PromptError, match="a prompt is nan"):
        llm.generate(pandas.Series(["x", None], dtype=object).fillna(float("nan")), GREEDY)


def test_without_pandas_a_table_says_how_to_get_it(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        llm.generate("x =", GREEDY).to_pandas()


@pytest.mark.parametrize(("ask", "words"), [
    (lambda llm: llm.generate(), "prompts is None and prompt_token_ids None; give one of them"),
    (lambda llm: llm.generate("x", prompt_token_ids=[1]), "give one of them"), (lambda llm: llm.generate(3), "prompts is 3"),
    (lambda llm: llm.generate(HI), r"give the messages to chat\("), (lambda llm: llm.generate("x", lora_request=object()), "merge the adapter"),
    (lambda llm: llm.generate("x", tokenization_kwargs={"truncation": True}), "truncate_prompt_tokens"),
    (lambda llm: llm.generate("x", use_tdqm=False), "did you mean 'use_tqdm'"), (lambda llm: llm.chat(HI, chat_template="no file"), "neither Jinja"),
    (lambda llm: llm.chat(HI, add_generation_prompt=True, continue_final_message=True), "are both true"),
    (lambda llm: llm.generate("x", ["x"]), "sampling parameters are 'x'"), (lambda llm: llm.generate([[1, "a"]]), "token id 'a'"),
])
def test_a_call_that_cannot_be_served_says_what_to_do(llm, ask, words):
    with pytest.raises(TpllmError, match=words):
        ask(llm)


def test_a_bar_of_the_users_own_is_told_of_every_prompt(llm):
    class Bar:
        made = []

        def __init__(self, total, desc):
            self.total, self.done, self.is_closed = total, 0, False
            self.made.append(self)

        def update(self, count):
            self.done += count

        def close(self):
            self.is_closed = True
    llm.generate(["x =", "y ="], GREEDY, use_tqdm=Bar)
    llm.chat(HI, GREEDY, use_tqdm=Bar)
    assert [(bar.total, bar.done, bar.is_closed) for bar in Bar.made] == [(2, 2, True), (1, 1, True)]


def test_the_prompt_of_a_chat_is_its_text(llm):
    tokenizer = llm.get_tokenizer()
    expected = llm.chat(HI, GREEDY)
    assert expected[0].prompt == tokenizer.render_chat(HI) == "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids_of(llm.chat("hi", GREEDY)) == ids_of(llm.generate({"messages": HI}, GREEDY)) == ids_of(expected)
    assert ids_of(llm.chat(["hi", HI], GREEDY, False)) == ids_of(expected) * 2
    assert llm.chat(HI, GREEDY, chat_template="<{{ messages[0]['content'] }}>")[0].prompt == "<hi>"
    shout = "{{ messages[0]['content'] }}{{ '!' if loud else '?' }}"
    assert llm.chat(HI, GREEDY, chat_template=shout, chat_template_kwargs={"loud": True})[0].prompt == "hi!"
    begun = llm.chat([*HI, {"role": "assistant", "content": "def f("}], GREEDY, continue_final_message=True)[0]
    assert begun.prompt == "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ndef f("
    assert begun.prompt_token_ids == tokenizer.encode(begun.prompt)


# --- sampling parameters ---------------------------------------------------------------------------------------------------------------
def test_parameters_may_be_changed_and_are_checked_again_when_used(llm):
    params = SamplingParams(temperature=0, stop="x", logit_bias={5: 1.0})
    copy = params.clone()
    params.max_tokens, params.stop = 3, "\n"
    params.logit_bias[6] = 2.0
    assert (copy.max_tokens, copy.stop, copy.logit_bias) == (None, ("x",), {5: 1.0})
    request = llm.submit("0", "import os\n", params)
    params.max_tokens = 100
    assert (request.params.max_tokens, request.params.stop) == (3, ("\n",))
    llm.engine.abort(request)
    params.temperature = -1
    with pytest.raises(SamplingError, match="temperature is -1"):
        llm.generate("import os\n", params)
    with pytest.raises(AttributeError, match="max_token"):
        params.max_token = 5


def test_what_is_none_is_not_given():
    assert SamplingParams.from_optional(temperature=0.1, top_p=None, n=None) == SamplingParams(temperature=0.1)


@pytest.mark.parametrize(("values", "words"), [
    ({"best_of": 2}, "best_of is 2, which is not supported; draw n completions"), ({"structured_outputs": object()}, "not constrained to a grammar"),
    ({"guided_decoding": object()}, "not constrained"), ({"logits_processors": [print]}, "logit_bias"), ({"use_beam_search": True}, "draw n"),
    ({"max_new_tokens": 3}, "transformers calls so what is here `max_tokens`"), ({"temprature": 1}, "did you mean 'temperature'"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"), ({"detokenize": False, "stop": "x"}, "detokenize is False; use stop_token_ids"),
    ({"output_kind": 3}, "output_kind is 3"), ({"detokenize": 1}, "must be True or False"), ({"logprobs": -2}, "logprobs is -2"),
])
def test_a_parameter_that_is_not_there_says_what_to_use(values, words):
    with pytest.raises(SamplingError, match=words):
        SamplingParams(**values)


def test_what_asks_for_nothing_is_taken():
    given = {"best_of": None, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "structured_outputs": None,
             "extra_args": None, "spaces_between_special_tokens": True}
    assert SamplingParams(temperature=0, **given) == SamplingParams(temperature=0)


def test_without_detokenizing_there_is_no_text(llm):
    given = {"temperature": 0, "max_tokens": 4}
    with_text, without = (llm.generate("import os\n", SamplingParams(**given, detokenize=value))[0].outputs[0] for value in (True, False))
    assert with_text.token_ids == without.token_ids
    assert (bool(with_text.text), without.text) == (True, "")
    assert (without.finished(), without.lora_request) == (True, None)


def test_the_first_tokens_of_a_prompt_may_be_cut_off(llm):
    ids = list(range(10, 300))
    cut = [llm.generate(ids, SamplingParams(temperature=0, max_tokens=most, truncate_prompt_tokens=number))[0].prompt_token_ids
           for number, most in ((3, 4), (400, None), (-1, 4), (-1, None)) if number != 400]
    assert cut == [ids[-3:], ids[-252:], ids[-255:]]
    with pytest.raises(PromptError, match=r"the prompt has 290 tokens, .* or set truncate_prompt_tokens"):
        llm.generate(ids, GREEDY)


def test_log_probabilities_beyond_the_limit_say_how_to_get_them(llm):
    for values, words in (({"logprobs": 21}, "logprobs is 21; .*from 0 to 20, or the LLM made with max_logprobs=21"),
                          ({"prompt_logprobs": -1}, "prompt_logprobs is -1; .*max_logprobs=-1")):
        with pytest.raises(SamplingError, match=words):
            llm.generate("x =", SamplingParams(**values))


def test_all_log_probabilities_of_a_token_sum_to_one_and_few_are_the_first_of_them():
    with LLM("demo", mesh="tp=2", max_logprobs=-1, **SHAPES) as llm:
        most, few = (llm.generate("x =", SamplingParams(temperature=0, max_tokens=2, logprobs=count, prompt_logprobs=count))[0] for count in (-1, 3))
    assert most.outputs[0].token_ids == few.outputs[0].token_ids
    all_scores, first_scores = ([*output.outputs[0].logprobs, *output.prompt_logprobs[1:]] for output in (most, few))
    for scores, first in zip(all_scores, first_scores, strict=True):
        assert len(scores) == 4096
        assert sum(np.exp(one.logprob) for one in scores.values()) == pytest.approx(1, abs=1e-3)
        ranked = sorted(scores.values(), key=lambda one: one.rank)
        assert [one.logprob for one in ranked] == sorted((one.logprob for one in ranked), reverse=True)
        assert {token: scores[token] for token in first} == first
        assert {one.rank for one in first.values()} >= {1, 2, 3}


# --- methods ---------------------------------------------------------------------------------------------------------------------------
def test_metrics_have_vllms_names_and_types(llm):
    def total(name):
        return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
    before = total("vllm:generation_tokens")
    llm.generate("import os\n", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert total("vllm:generation_tokens") == before + 4
    found = {metric.name: metric for metric in llm.get_metrics()}
    assert isinstance(found["vllm:num_requests_running"], Gauge)
    assert isinstance(found["vllm:prefix_cache_hits"], Counter)
    first = found["vllm:time_to_first_token_seconds"]
    assert isinstance(first, Histogram)
    assert first.buckets["+Inf"] == first.count > 0
    assert found["vllm:request_success"].labels["finished_reason"] in ("length", "stop", "abort")


def test_a_method_of_another_name_is_ours_and_one_that_is_not_there_says_what_to_use(llm):
    assert llm.llm_engine is llm.engine
    assert llm.shutdown == llm.close
    for name, words in (("beam_search", "draw n completions"), ("embed", "models here generate text"), ("generat", "did you mean 'generate'")):
        with pytest.raises(AttributeError, match=words):
            getattr(llm, name)
    assert not hasattr(llm, "sleep")


@pytest.mark.parametrize(("name", "words"), [("EngineArgs", "give the arguments to LLM"), ("AsyncLLMEngine", "use AsyncLLM"),
                                             ("LLm", "did you mean 'LLM'")])
def test_a_type_that_is_not_there_says_what_to_use(name, words):
    with pytest.raises(AttributeError, match=words):
        getattr(tpllm, name)


def test_a_template_that_refuses_is_told_apart_from_a_bad_call(llm):
    with pytest.raises(TokenizerError, match="chat template of this call"):
        llm.chat(HI, GREEDY, chat_template="{{ raise_exception('no') }}")


class TorchHalf:
    """Prints itself as torch's dtype does."""

    def __str__(self):
        return "torch.float16"


@pytest.mark.parametrize("given", ["half", "float16", "torch.float16", TorchHalf(), np.float16, np.dtype("float16"), jax.numpy.float16], ids=str)
def test_a_dtype_may_be_torchs_or_numpys(given):
    assert choose_dtype(given, {}, ONE_DEVICE) == np.float16
    assert choose_cache_dtype(given, np.dtype("float32")) == np.float16


def test_the_cache_knows_vllms_name_of_its_8_bits():
    assert choose_cache_dtype("fp8_e4m3", np.dtype("float32")) == choose_cache_dtype("fp8", np.dtype("float32"))
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8_e5m2'"):
        choose_cache_dtype("fp8_e5m2", np.dtype("float32"))
