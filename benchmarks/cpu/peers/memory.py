"""The most memory that either side takes, each in a process of its own (this module, run as one): a model is opened, reads a prompt and decodes.

The peak is that of the process's own pages (VmHWM). ``ru_maxrss`` would be no less than what the process that started it held at that time.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

STATUS = pathlib.Path("/proc/self/status")


def measure_memory(path: pathlib.Path, opened: dict[str, str | None], *, prompt_len: int, num_steps: int) -> dict[str, Any] | None:
    """Peaks of both sides in bytes, and ours over what it may be: 1.1 times the peer's and what importing JAX takes.

    None where the system has no /proc. Ours is measured twice: as it compiles its programs, and as it reads them from the compile cache (an empty
    one, which the first run fills), as every further start on a machine does.

    Args:
        path: the peer's GGUF file.
        opened: ``path``, or ``shape`` and ``quantization``, as for ``open_ours``.
        prompt_len: tokens of the one prompt.
        num_steps: decode steps.
    """
    if not STATUS.exists():
        return None
    lengths = {"prompt_len": prompt_len, "num_steps": num_steps}
    peer = _run_child("peer", {"path": str(path), **lengths})
    with tempfile.TemporaryDirectory(prefix="tpllm-cache-") as cache:
        compiling, ours = (_run_child("ours", {"opened": opened, **lengths}, TPLLM_CACHE_DIR=cache) for _ in range(2))
    limit = 1.1 * peer["peak_bytes"] + ours["import_bytes"]
    return {**lengths, "ours": ours, "ours_compiling": compiling, "peer": peer, "limit_bytes": limit, "ratio": ours["peak_bytes"] / limit,
            "ratio_compiling": compiling["peak_bytes"] / limit}


def _run_child(side: str, options: dict[str, Any], **environment: str) -> dict[str, int]:
    words = [sys.executable, "-m", "benchmarks.cpu.peers.memory", side, json.dumps(options)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[3],
                          env={**os.environ, "JAX_PLATFORMS": "cpu", **environment})
    return json.loads(done.stdout.splitlines()[-1])


def use_ours(opened: dict[str, str | None], *, prompt_len: int, num_steps: int) -> dict[str, int]:
    """What importing JAX and tpllm left resident, and the peak once weights are made and one prompt is completed."""
    import jax  # noqa: F401

    import tpllm

    import_bytes = _status_bytes("VmRSS")
    from benchmarks.cpu.peers.ours import open_ours

    llm = open_ours(**opened, context_len=prompt_len + num_steps + 1, num_seqs=1)
    greedy = tpllm.SamplingParams(temperature=0, max_tokens=num_steps + 1, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [1] * prompt_len}], greedy, use_tqdm=False)
    return {"import_bytes": import_bytes, "peak_bytes": _status_bytes("VmHWM")}


def use_peer(path: str, *, prompt_len: int, num_steps: int) -> dict[str, int]:
    """The same of llama.cpp and a GGUF file."""
    import numpy as np

    from benchmarks.cpu.peers.cells import num_threads
    from benchmarks.cpu.peers.llama_cpp_model import PeerContext, PeerModel

    import_bytes = _status_bytes("VmRSS")
    context = PeerContext(PeerModel(pathlib.Path(path)), num_seqs=1, context_len=prompt_len + num_steps + 1, num_threads=num_threads(),
                          has_flash_attention=True)
    context.run(np.ones((1, prompt_len), np.int32), num_steps)
    return {"import_bytes": import_bytes, "peak_bytes": _status_bytes("VmHWM")}


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps({"ours": use_ours, "peer": use_peer}[sys.argv[1]](**json.loads(sys.argv[2]))))
