"""llama.cpp as the peer: a GGUF file, prefilled and decoded greedily through its C functions, so that hardly any Python is in its time.

This module imports nothing of JAX or tpllm: a process that measures the peer's memory holds no more than the peer.
"""
import ctypes
import dataclasses
import pathlib
import sys
import time

import llama_cpp
import numpy as np

from benchmarks.cpu.peers.cells import PAUSE_S, Cell, num_threads

MIN_BATCH = 2048  # llama.cpp's own default of the most tokens in one call
MICRO_BATCH = 512  # and of those computed at once
ATTENTIONS = {"fused": True, "products": False}
NUM_TRIALS = 2  # of each attention
LOG_LEVEL_ERROR = 4
CACHE_BLOCK = 256  # it makes caches of whole blocks of tokens
# What llama.cpp calls the instruction sets its matrix products use, and what Linux calls them.
INSTRUCTION_SETS = {"F16C": "f16c", "FMA": "fma", "AVX2": "avx2", "AVX_VNNI": "avx_vnni", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni"}


@dataclasses.dataclass(frozen=True)
class PeerRun:
    """One run: seconds of the prefill (until the first tokens are known) and of the steps after it, and each row's tokens, 1 + steps of them."""

    prefill_s: float
    decode_s: float
    tokens: list[list[int]]


@llama_cpp.llama_log_callback
def _show_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


def show_only_errors() -> None:
    """Let llama.cpp write nothing but errors. (The bindings' own filter takes warnings for errors and errors for details.)"""
    llama_cpp.llama_log_set(_show_errors, None)


class PeerModel:
    """A GGUF file, read into memory of llama.cpp's own: a mapped one would be as fast as its pages happen to lie.

    Args:
        path: the file.

    Raises:
        ValueError: llama.cpp cannot open it.
    """

    def __init__(self, path: pathlib.Path):
        show_only_errors()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ValueError(f"llama.cpp cannot open {path}; its reason is on standard error")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.handle))

    def close(self) -> None:
        """Give its memory back; contexts over it are closed before."""
        llama_cpp.llama_model_free(self.handle)


class PeerContext:
    """Some sequences of one model: a KV cache in float16, and buffers.

    Args:
        model: open, for as long as this is.
        num_seqs: sequences that are computed together, each with a cache of its own.
        context_len: tokens of each, prompt and completion.
        num_threads: for prefill and decode alike.
        has_flash_attention: llama.cpp's fused attention, or the one of separate products.

    Raises:
        ValueError: llama.cpp cannot make it.
    """

    def __init__(self, model: PeerModel, *, num_seqs: int, context_len: int, num_threads: int, has_flash_attention: bool):
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = num_seqs, num_seqs * -(-context_len // CACHE_BLOCK) * CACHE_BLOCK
        params.n_batch, params.n_ubatch = max(MIN_BATCH, params.n_ctx), MICRO_BATCH
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if has_flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ValueError(f"llama.cpp makes no context of {num_seqs} x {context_len} tokens; its reason is on standard error")
        self._memory, self._vocab_size = llama_cpp.llama_get_memory(self._handle), model.vocab_size
        self._num_seqs, self._context_len = num_seqs, context_len
        self._prompts, self._step = _Batch(num_seqs * context_len), _Batch(num_seqs)
        self._logits: dict[int, np.ndarray] = {}  # views of llama.cpp's own buffer, by address

    def run(self, prompts_BT: np.ndarray, num_steps: int) -> PeerRun:
        """Prefill all prompts in one call, then give each sequence ``num_steps`` more tokens, greedily; from an empty cache.

        Args:
            prompts_BT: token ids of equal length.
            num_steps: decode steps after the first token, which comes with the prefill.

        Raises:
            ValueError: the context holds fewer rows or tokens, or llama.cpp fails.
        """
        num_rows, prompt_len = prompts_BT.shape
        if num_rows > self._num_seqs or prompt_len + num_steps > self._context_len:
            raise ValueError(f"{num_rows} rows of {prompt_len + num_steps} tokens are more than a context of {self._num_seqs} x {self._context_len} "
                             "holds; make a larger one")
        llama_cpp.llama_memory_clear(self._memory, True)
        self._prompts.fill(prompts_BT)
        self._step.fill(np.zeros((num_rows, 1), np.int32))
        last_rows = [(row + 1) * prompt_len - 1 for row in range(num_rows)]
        tokens_TB = np.empty((num_steps + 1, num_rows), np.int32)
        start = time.perf_counter()
        tokens_TB[0] = self._decode(self._prompts, last_rows)
        after_prefill = time.perf_counter()
        for step in range(num_steps):
            self._step.tokens[:num_rows], self._step.positions[:num_rows] = tokens_TB[step], prompt_len + step
            tokens_TB[step + 1] = self._decode(self._step, range(num_rows))
        return PeerRun(after_prefill - start, time.perf_counter() - after_prefill, tokens_TB.T.tolist())

    def _decode(self, batch: "_Batch", rows) -> list[int]:
        """The best token after each of the batch's rows."""
        if code := llama_cpp.llama_decode(self._handle, batch.struct):
            raise ValueError(f"llama.cpp cannot decode {batch.struct.n_tokens} tokens (error {code}); its reason is on standard error")
        return [int(self._logits_of(row).argmax()) for row in rows]

    def _logits_of(self, row: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._handle, row)
        address = ctypes.addressof(pointer.contents)
        if address not in self._logits:
            self._logits[address] = np.ctypeslib.as_array(pointer, (self._vocab_size,))
        return self._logits[address]

    def close(self) -> None:
        """Give its memory back."""
        self._logits.clear()
        self._prompts.close()
        self._step.close()
        llama_cpp.llama_free(self._handle)


class _Batch:
    """llama.cpp's batch: sequence i holds row i of what fills it."""

    def __init__(self, capacity: int):
        self.struct = llama_cpp.llama_batch_init(capacity, 0, 1)
        self.tokens, self.positions, self._num_seq_ids, self._has_logits = (
            np.ctypeslib.as_array(array, (capacity,)) for array in (self.struct.token, self.struct.pos, self.struct.n_seq_id, self.struct.logits))

    def fill(self, tokens_BT: np.ndarray) -> None:
        """Rows at positions from 0 on; logits are asked for after the last token of each."""
        num_rows, length = tokens_BT.shape
        count = self.struct.n_tokens = num_rows * length
        self.tokens[:count], self.positions[:count], self._num_seq_ids[:count] = tokens_BT.ravel(), np.tile(np.arange(length), num_rows), 1
        self._has_logits[:count] = np.tile(np.arange(length) == length - 1, num_rows)
        for index in range(count):
            self.struct.seq_id[index][0] = index // length

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_batch_free(self.struct)


def choose_attention(cell: Cell, model: PeerModel, rng: np.random.Generator) -> tuple[PeerContext, dict[str, list[float]]]:
    """The peer with the attention that is the faster one in this cell, warmed up; and the speeds of each trial."""
    sizes = {"num_seqs": cell.num_rows, "context_len": cell.context_len, "num_threads": num_threads()}
    contexts = {name: PeerContext(model, has_flash_attention=is_fused, **sizes) for name, is_fused in ATTENTIONS.items()}
    trials: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(NUM_TRIALS):
        for name, context in contexts.items():
            trials[name].append(time_peer(cell, context, model.vocab_size, rng)["tokens_per_s"])
    chosen = contexts.pop(best_attention(trials))
    for context in contexts.values():
        context.close()
    return chosen, trials


def best_attention(trials: dict[str, list[float]]) -> str:
    """The one with the fastest trial."""
    return max(trials, key=lambda name: max(trials[name]))


def time_peer(cell: Cell, context: PeerContext, vocab_size: int, rng: np.random.Generator) -> dict[str, float]:
    """One turn of llama.cpp, with new prompts."""
    prompts_BT = rng.integers(0, vocab_size, (cell.num_rows, cell.prompt_len), np.int32)
    time.sleep(PAUSE_S)
    run = context.run(prompts_BT, cell.num_steps)
    speed = cell.num_rows * cell.num_steps / run.decode_s if cell.num_steps else cell.prompt_len / run.prefill_s
    return {"prefill_s": run.prefill_s, "tokens_per_s": speed}


def system_line() -> str:
    """What llama.cpp says of its build and this machine."""
    return llama_cpp.llama_print_system_info().decode().strip()


def cpu_flags() -> set[str]:
    """This CPU's features as Linux names them; none where it does not tell."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def missing_features(line: str, flags: set[str]) -> list[str]:
    """Instruction sets that the CPU has and this build of llama.cpp does not use.

    Args:
        line: as :func:`system_line` gives it.
        flags: as :func:`cpu_flags` gives them.
    """
    used = {part.rpartition(":")[2].split("=")[0].strip() for part in line.split("|") if part.split("=")[-1].strip() == "1"}
    # Where both are, ggml's products use the wider of the two VNNIs.
    needless = {"AVX_VNNI"} if "AVX512_VNNI" in used else set()
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags and name not in used and name not in needless]
