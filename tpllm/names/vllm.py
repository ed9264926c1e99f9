"""vLLM's names (https://docs.vllm.ai/en/latest/api/): of ``LLM`` and ``EngineArgs``, of its methods, and of ``SamplingParams``."""
from collections.abc import Mapping
from typing import Any

from tpllm.names.translate import Only, Refused, Renamed, Same, Table, Taken, whole

MERGE = "merge the adapter into the weights (merge_and_unload of peft), save them, and open that folder"
TEXT_ONLY = "models here read text only"
OTHER_TASKS = "models here generate text; use vLLM or sentence-transformers for this"
IN_PROMPT = ("output is not constrained to a grammar; ask for the form in the prompt and check the answer, or allow single tokens with "
             "allowed_token_ids")


def _mesh(given: Mapping[str, Any]) -> dict[str, int]:
    return {axis: whole(name, 1 if given.get(name) is None else given[name])
            for axis, name in (("dp", "data_parallel_size"), ("tp", "tensor_parallel_size"))}


def _chunk(given: Mapping[str, Any]) -> int:
    """The largest power of two of at most so many tokens."""
    return 1 << whole("max_num_batched_tokens", given["max_num_batched_tokens"], least=16).bit_length() - 1


def _cache_tokens(given: Mapping[str, Any]) -> int:
    page = given.get("block_size") or given.get("page_size") or 32
    return whole("num_gpu_blocks_override", given["num_gpu_blocks_override"]) * whole("block_size", page) * _mesh(given)["dp"]


def _is_this_platform(device: Any) -> bool:
    import jax
    name = str(getattr(device, "type", device)).split(":")[0]
    return name in ("auto", jax.default_backend()) or (name == "cuda" and jax.default_backend() == "gpu")


ARGUMENTS: Table = {
    "model": Same("also a GGUF file, alone or in the hub: `owner/name:Q4_K_M`, `hf.co/owner/name:Q4_K_M`"),
    "tokenizer": Same("a folder, hub id or GGUF file"), "tokenizer_revision": Same(), "skip_tokenizer_init": Same(),
    "dtype": Same(), "quantization": Same("the name of a checkpoint's own format (`awq`, `gptq`, ...) is taken and means: as it is stored"),
    "kv_cache_dtype": Same("`fp8` is e4m3; there is `int8` too"), "seed": Same("None draws another one each time"), "revision": Same(),
    "max_model_len": Same("by default at most 4096, since a longer one takes memory"), "max_num_seqs": Same("8 on CPU, 32 elsewhere"),
    "enable_prefix_caching": Same(), "chat_template": Same("Jinja text, or the path of a file"),
    "hf_overrides": Same("a dict; no function"), "hf_token": Same(), "download_dir": Same(),
    "generation_config": Same('"auto", "vllm" or a folder'), "override_generation_config": Same(),
    "gpu_memory_utilization": Same("of all the memory that JAX has on each device; on a CPU of the machine's"),
    "max_logprobs": Same("-1 for the whole vocabulary"),
    "tensor_parallel_size": Renamed("mesh", "`tensor_parallel_size=4` is `mesh=\"tp=4\"`; by default all devices are used", int | None, _mesh),
    "data_parallel_size": Renamed("mesh", "`data_parallel_size=2` is `mesh=\"dp=2\"`, in one process", int | None, _mesh),
    "max_num_batched_tokens": Renamed("prefill_chunk_size", "the largest power of two below; rows that decode come on top", int | None, _chunk),
    "block_size": Renamed("page_size", "16, 32, 64 or 128", int | None),
    "num_gpu_blocks_override": Renamed("kv_cache_tokens", "pages times their size", int | None, _cache_tokens),
    "pipeline_parallel_size": Only((1,), "layers are not split over devices yet; use tensor_parallel_size"),
    "prefill_context_parallel_size": Only((1,), "a prompt is not split over devices; use tensor_parallel_size"),
    "decode_context_parallel_size": Only((1,), "a context is not split over devices; use tensor_parallel_size"),
    "trust_remote_code": Refused("code that comes with a checkpoint is never run; leave it out: known architectures load without their code"),
    "device": Only(_is_this_platform, "JAX chooses; set JAX_PLATFORMS=cpu, cuda or tpu before Python starts"),
    "tokenizer_mode": Only(("auto", "hf", "slow"), "leave it out: tokenizer.json, or a GGUF file's own tokenizer, is read"),
    "load_format": Only(("auto", "hf", "safetensors", "gguf", "bitsandbytes", "fastsafetensors", "runai_streamer"),
                        "leave it out: safetensors, GGUF files and stores are told apart by themselves; LLM.from_params takes arrays"),
    "config_format": Only(("auto", "hf"), "leave it out: config.json, or a GGUF file, is read"),
    "task": Only(("auto", "generate"), OTHER_TASKS), "runner": Only(("auto", "generate"), OTHER_TASKS),
    "convert": Only(("auto", "none"), OTHER_TASKS),
    "logprobs_mode": Only(("raw_logprobs",), "log probabilities are the model's own, before temperature and filters"),
    "cpu_offload_gb": Only((0,), "weights stay on their devices; use quantization, or a mesh of more devices"),
    "kv_offloading_size": Only((0,), "a row that loses its pages is computed again, or kept on the host: see preemption"),
    "kv_cache_memory_bytes": Refused("use kv_cache_tokens, which are tokens, or memory_share"),
    "disable_sliding_window": Refused("windows of attention are the model's; set max_model_len to the window to get no further than it"),
    "enable_lora": Refused(MERGE), "max_loras": Refused(MERGE), "max_lora_rank": Refused(MERGE), "fully_sharded_loras": Refused(MERGE),
    "speculative_config": Refused("tokens are not drafted yet; leave it out"),
    "logits_processors": Refused("use logit_bias, allowed_token_ids or bad_words of SamplingParams"),
    "enable_prompt_embeds": Refused("give text, messages or token ids"), "enable_return_routed_experts": Refused("leave it out"),
    "enable_sleep_mode": Refused("close() gives the memory back, and a new LLM takes it again"),
    "hf_config_path": Refused("use hf_overrides, or a folder with that config.json"),
    "kv_transfer_config": Refused("keys and values stay in their process"), "ec_transfer_config": Refused(TEXT_ONLY),
    "pooler_config": Refused(OTHER_TASKS), "override_pooler_config": Refused(OTHER_TASKS),
    "enforce_eager": Taken("programs are always compiled, and kept on disk"),
    "compilation_config": Taken("XLA compiles, without settings of vLLM"), "optimization_level": Taken("XLA always optimizes"),
    "max_seq_len_to_capture": Taken("there are no CUDA graphs"), "cuda_graph_sizes": Taken("there are no CUDA graphs"),
    "cudagraph_capture_sizes": Taken("there are no CUDA graphs"),
    "swap_space": Taken("rows that lose their pages are computed again or kept in the host's memory, see preemption"),
    "disable_log_stats": Taken("get_metrics() and metrics() always work"), "use_tqdm_on_load": Taken("loading shows no bar"),
    "enable_chunked_prefill": Taken("prompts are always computed in pieces, see prefill_chunk_size"),
    "max_num_partial_prefills": Taken("pieces of several prompts share a step wherever there is room"),
    "long_prefill_token_threshold": Taken("a long prompt leaves room for others by itself"),
    "async_scheduling": Taken("the next step is always queued while one runs"),
    "scheduling_policy": Taken("rows of a lower priority value come first, and among equals those that came first"),
    "distributed_executor_backend": Taken("one process drives all devices"), "enable_expert_parallel": Taken("experts are cut over tp"),
    "max_parallel_loading_workers": Taken("weights are read by shard, in parallel"),
    "disable_custom_all_reduce": Taken("XLA exchanges what devices need"), "served_model_name": Taken("there is no server in LLM"),
    "code_revision": Taken("code that comes with a checkpoint is never run"), "model_impl": Taken("there is one implementation of a model"),
    "ignore_patterns": Taken("only what is needed is fetched"), "model_loader_extra_config": Taken("the loader needs no settings"),
    "calculate_kv_scales": Taken("an 8-bit cache always has its own scales"), "disable_cascade_attn": Taken("there is no cascade attention"),
    "guided_decoding_backend": Taken("output is not constrained"), "structured_outputs_config": Taken("output is not constrained"),
    "reasoning_parser": Taken("texts are given as they are"), "use_v2_block_manager": Taken("there is one way to hand out pages"),
    "allowed_local_media_path": Taken(TEXT_ONLY), "allowed_media_domains": Taken(TEXT_ONLY), "limit_mm_per_prompt": Taken(TEXT_ONLY),
    "mm_processor_kwargs": Taken(TEXT_ONLY), "media_io_kwargs": Taken(TEXT_ONLY), "disable_mm_preprocessor_cache": Taken(TEXT_ONLY),
    "attention_config": Taken("the kernel follows from device and shapes"), "profiler_config": Taken("use jax.profiler.trace(folder)"),
    "additional_config": Taken("there is no platform plugin"), "prefix_caching_hash_algo": Taken("pages are known by SHA-256"),
}
"""Of ``LLM(...)``."""

CALLS: Table = {
    "prompts": Same("text, token ids, dicts of them, a pandas Series, a numpy array"), "sampling_params": Same(), "use_tqdm": Same(),
    "prompt_token_ids": Same(), "priority": Same("one for all, too"), "messages": Same("a text is a message of the user's"),
    "chat_template": Same(), "add_generation_prompt": Same(), "continue_final_message": Same(), "tools": Same(),
    "chat_template_kwargs": Renamed("template_kwargs", kind=Mapping[str, Any] | None),
    "chat_template_content_format": Taken("the template is looked at"),
    "lora_request": Refused(MERGE), "mm_processor_kwargs": Refused(TEXT_ONLY),
    "tokenization_kwargs": Refused("use truncate_prompt_tokens of SamplingParams, or encode prompts yourself: "
                                   "{'prompt_token_ids': llm.get_tokenizer().encode(text, add_special_tokens=False)}"),
}
"""Of ``generate`` and ``chat``."""

METHODS: Table = {
    "generate": Same(), "chat": Same(), "get_tokenizer": Same(), "get_default_sampling_params": Same(), "get_metrics": Same("with vLLM's names"),
    "reset_prefix_cache": Same(), "llm_engine": Renamed("engine"), "shutdown": Renamed("close"),
    "model_config": Refused("use config, which is the model's, and shapes, which has max_model_len"),
    "beam_search": Refused("draw n completions and take the one of the highest cumulative_logprob"),
    "embed": Refused(OTHER_TASKS), "encode": Refused(OTHER_TASKS), "classify": Refused(OTHER_TASKS), "score": Refused(OTHER_TASKS),
    "reward": Refused(OTHER_TASKS), "set_tokenizer": Refused("give tokenizer=... when the LLM is made"),
    "start_profile": Refused("use jax.profiler.start_trace(folder)"), "stop_profile": Refused("use jax.profiler.stop_trace()"),
    "sleep": Refused("close() gives the memory back, and a new LLM takes it again"), "wake_up": Refused("make a new LLM"),
    "apply_model": Refused("params are the model's parameters, and tpllm.forward runs them"),
    "collective_rpc": Refused("one process drives all devices; params and config are there"),
    "from_engine_args": Refused("give the arguments to LLM(...)"), "preprocess_chat": Refused("use get_tokenizer().apply_chat_template(...)"),
}
"""Of an ``LLM``."""

SAMPLING: Table = {
    **{name: Same() for name in ("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed",
                                 "stop", "stop_token_ids", "bad_words", "ignore_eos", "min_tokens", "detokenize", "skip_special_tokens",
                                 "include_stop_str_in_output", "logit_bias", "allowed_token_ids")},
    "max_tokens": Same("None, until the context is full, is the default; vLLM's is 16"),
    "logprobs": Same("-1 for all, where LLM has max_logprobs=-1"), "prompt_logprobs": Same("the like"),
    "truncate_prompt_tokens": Same("-1 keeps what leaves room for max_tokens"),
    "output_kind": Same("of `AsyncLLM.generate`"),
    "best_of": Refused("draw n completions and take the one of the highest cumulative_logprob"),
    "use_beam_search": Refused("draw n completions and take the one of the highest cumulative_logprob"),
    "length_penalty": Only((1, 1.0), "there is no beam search"), "early_stopping": Only((False,), "there is no beam search"),
    "structured_outputs": Refused(IN_PROMPT), "guided_decoding": Refused(IN_PROMPT),
    "logits_processors": Refused("use logit_bias, allowed_token_ids or bad_words"),
    "extra_args": Refused("nothing would read them; leave them out"),
    "flat_logprobs": Refused("log probabilities are lists of dicts; leave it out"),
    "logprob_token_ids": Refused("use logprobs=-1 with LLM(..., max_logprobs=-1), and look them up"),
    "thinking_token_budget": Refused("use max_tokens, or turn thinking off: chat_template_kwargs={'enable_thinking': False}"),
    "repetition_detection": Refused("use repetition_penalty or frequency_penalty"),
    "spaces_between_special_tokens": Taken("the tokenizer's own decoder joins the texts of tokens"),
}
"""Of ``SamplingParams(...)``."""

TYPES: Table = {
    "EngineArgs": Refused("give the arguments to LLM(...)"), "AsyncEngineArgs": Refused("give the arguments to AsyncLLM(...)"),
    "AsyncLLMEngine": Refused("use AsyncLLM"), "LLMEngine": Refused("use LLM(...).engine"), "PoolingParams": Refused(OTHER_TASKS),
    "BeamSearchParams": Refused("draw n completions and take the one of the highest cumulative_logprob"),
    "TextPrompt": Same(), "TokensPrompt": Same(), "RequestOutputKind": Same(),
}
"""Of the package."""
