"""Names of transformers, llama.cpp (llama-cpp-python's and the command line's) and mlx-lm, each with what it is here."""
from collections.abc import Mapping

OTHERS: Mapping[str, Mapping[str, str]] = {
    "transformers": {
        "AutoModelForCausalLM.from_pretrained": "`LLM(model)`", "AutoTokenizer.from_pretrained": "`llm.get_tokenizer()`",
        "pipeline": "`LLM(model)`, and then `llm(prompts)` or `llm.chat(messages)`", "TextStreamer": "`llm.stream(prompt)`",
        "apply_chat_template": "`llm.chat(messages)`, or the tokenizer's method of that name",
        "torch_dtype": "`dtype`", "device_map": "`mesh`", "attn_implementation": "chosen by itself, from device and shapes",
        "load_in_8bit": '`quantization="int8"`', "load_in_4bit": '`quantization="int4"`', "quantization_config": "`quantization`",
        "cache_dir": "`download_dir`", "token": "`hf_token`",
        "max_new_tokens": "`max_tokens`", "min_new_tokens": "`min_tokens`", "max_length": "`max_tokens`, which does not count the prompt",
        "do_sample": "`temperature`: 0 is `do_sample=False`", "num_return_sequences": "`n`", "num_beams": "not there: draw `n` completions",
        "eos_token_id": "`stop_token_ids`", "stop_strings": "`stop`", "bad_words_ids": "`bad_words`, which are texts",
        "sequence_bias": "`logit_bias`, for single tokens", "suppress_tokens": "`logit_bias` of -100", "output_scores": "`logprobs`",
        "no_repeat_ngram_size": "not there: use `repetition_penalty` or `frequency_penalty`", "typical_p": "not there: use `min_p`",
    },
    "llama.cpp": {
        "model_path": "`model`", "Llama.from_pretrained": '`LLM("owner/name:Q4_K_M")`', "create_completion": "`llm.generate(prompt)`",
        "create_chat_completion": "`llm.chat(messages)`", "n_ctx": "`max_model_len`", "ctx_size": "`max_model_len`",
        "n_batch": "`prefill_chunk_size`", "n_ubatch": "`prefill_chunk_size`", "n_parallel": "`max_num_seqs`", "n_seq_max": "`max_num_seqs`",
        "n_threads": "the environment variable TPLLM_NUM_THREADS", "n_gpu_layers": "the environment variable JAX_PLATFORMS: all layers or none",
        "tensor_split": "`mesh`", "type_k": "`kv_cache_dtype`", "type_v": "`kv_cache_dtype`", "cache_type_k": "`kv_cache_dtype`",
        "cache_type_v": "`kv_cache_dtype`", "chat_format": "`chat_template`", "draft_model": "not there yet",
        "n_predict": "`max_tokens`", "temp": "`temperature`", "repeat_penalty": "`repetition_penalty`", "logits_all": "`prompt_logprobs`",
        "grammar": "not there: output is not constrained", "mirostat_mode": "not there: use `top_p` or `min_p`",
        "echo": "`output.prompt` before the text",
    },
    "mlx-lm": {
        "mlx_lm.load": "`LLM(model)`, or `load_model(model)` for the arrays", "mlx_lm.generate": "`llm.generate(prompt)`",
        "stream_generate": "`llm.stream(prompt)`", "batch_generate": "`llm.generate(prompts)`", "mlx_lm.convert": "`tpllm quantize`",
        "path_or_hf_repo": "`model`", "adapter_path": "not there: fuse the adapter (`mlx_lm.fuse`) and open that folder",
        "max_kv_size": "`max_model_len`", "kv_bits": '`kv_cache_dtype="int8"`', "prefill_step_size": "`prefill_chunk_size`",
        "prompt_cache": "kept by itself: `enable_prefix_caching`", "num_draft_tokens": "not there yet",
        "sampler": "fields of `SamplingParams`", "make_sampler": "`SamplingParams(...)`",
    },
}
"""By project: its name -> ours."""
