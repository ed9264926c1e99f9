"""transformers' continuous batching over a paged cache.

``generate_batch`` gives all prompts the same number of tokens, so this is its body with a number for each: its own manager, opened as it opens it,
and a request for each prompt. What it does before the first request (making the cache) and after the last (closing) is not in the time.
"""
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.cpu.peers.cells import PAUSE_S
from benchmarks.cpu.peers.llama_cpp_parallel import BATCH, PeerRequest

PAGE = 256  # its default
NO_END = -1  # how it is told that no token ends a row
POLL_S = 1.0


def batching_config(num_seqs: int, context_len: int) -> ContinuousBatchingConfig:
    """As many sequences as the others, a cache in which all of them fit at full length, and as many tokens in a step. On a CPU there are neither
    graphs nor flash attention to switch on."""
    num_blocks = num_seqs * -(-context_len // PAGE) + 1
    return ContinuousBatchingConfig(max_requests_per_batch=num_seqs, max_batch_tokens=BATCH, num_blocks=num_blocks, page_size=PAGE,
                                    auto_switch_to_flash=False, allow_block_sharing=False)


@torch.inference_mode()
def run_batch(model: PreTrainedModel, requests: Sequence[PeerRequest], *, num_seqs: int, context_len: int) -> tuple[float, list[list[int]]]:
    """Complete all requests, greedily; (seconds, the tokens of each).

    Args:
        model: in eval mode, with sdpa attention.
        requests: all are there from the start.
        num_seqs: sequences at once.
        context_len: of the longest.

    Raises:
        ValueError: a request failed, or got another number of tokens.
    """
    time.sleep(PAUSE_S)
    config = GenerationConfig(do_sample=False, eos_token_id=NO_END, pad_token_id=0)
    with _only_errors(), model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching_config(num_seqs, context_len), timeout=30) as manager:
        start = time.perf_counter()
        names = [manager.add_request(request.prompt_token_ids, max_new_tokens=request.output_len) for request in requests]
        results = {}
        while len(results) < len(requests):
            result = manager.get_result(timeout=POLL_S)
            if result is not None and result.is_finished():
                results[result.request_id] = result
            elif result is None and not manager.is_running():
                raise ValueError("transformers' generation thread ended before the requests did")
        seconds = time.perf_counter() - start
    tokens = [results[name].generated_tokens for name in names]
    if [len(one) for one in tokens] != [request.output_len for request in requests]:
        raise ValueError(f"transformers gave {sum(map(len, tokens))} of {sum(request.output_len for request in requests)} tokens: "
                         f"{next((results[name].error for name in names if results[name].error), 'no error')}")
    return seconds, tokens


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def time_batch(model: PreTrainedModel, requests: Sequence[PeerRequest], *, num_seqs: int, context_len: int) -> dict[str, float]:
    """Complete all requests once."""
    seconds, tokens = run_batch(model, requests, num_seqs=num_seqs, context_len=context_len)
    return {"seconds": seconds, "output_tokens_per_s": sum(map(len, tokens)) / seconds}
