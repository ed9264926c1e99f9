"""Compiling a lowered program, and what the compiler made of it: collectives, memory, and what is updated in place."""
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from tpllm.aot import hlo
from tpllm.errors import MemoryNeedError

_OUT_OF_MEMORY = re.compile(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)")  # libtpu's words


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One compiled program.

    Attributes:
        executable: what the compiler gave; runs only where the devices exist.
        text: its optimized HLO, that of one device.
    """

    executable: jax.stages.Compiled
    text: str

    @functools.cached_property
    def instructions(self) -> list[hlo.Instruction]:
        """Every instruction."""
        return hlo.read_instructions(self.text)

    @functools.cached_property
    def collectives(self) -> list[hlo.Instruction]:
        """What devices exchange."""
        return hlo.collectives(self.instructions)

    @functools.cached_property
    def materialized(self) -> list[hlo.Instruction]:
        """What is written into the devices' main memory."""
        return hlo.materialized(self.instructions)

    @property
    def num_aliased(self) -> int:
        """How many outputs lie in the memory of a donated argument."""
        return hlo.num_aliased(self.text)

    @property
    def temporary_bytes(self) -> int:
        """Bytes of a device's main memory that it needs beside arguments and outputs while the program runs."""
        return self.executable.memory_analysis().temp_size_in_bytes

    def describe(self) -> dict[str, Any]:
        """Counts and bytes of one device, JSON-able."""
        memory = self.executable.memory_analysis()
        counts = collections.Counter((found.op, results_text(found)) for found in self.collectives)
        return {
            "collectives": [{"op": op, "result": result, "count": count} for (op, result), count in counts.most_common()],
            "num_aliased": self.num_aliased, "argument_bytes": memory.argument_size_in_bytes, "output_bytes": memory.output_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
            "code_bytes": memory.generated_code_size_in_bytes,
        }


def compile_lowered(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Run the compiler of the mesh's devices.

    Args:
        lowered: from :mod:`tpllm.aot.step_programs`, or of any other jitted function.

    Raises:
        MemoryNeedError: the compiler finds that the program does not fit into a device; what it needs and what there is.
    """
    return compile_all([lowered])[0]


def compile_all(lowered: Sequence[jax.stages.Lowered]) -> list[CompiledProgram]:
    """As :func:`compile_lowered` for several programs, side by side."""
    with _unstored(), concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
        return list(pool.map(_compile, lowered))


def _compile(lowered: jax.stages.Lowered) -> CompiledProgram:
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _OUT_OF_MEMORY.search(str(error)):
            raise MemoryNeedError(f"the program needs {found[1]}iB of each device, which has {found[2]}iB; lower max_model_len or max_num_seqs, "
                                  "take a smaller dtype or model, or a mesh of more devices") from error
        raise
    return CompiledProgram(executable=executable, text=executable.as_text())


@contextlib.contextmanager
def _unstored() -> Iterator[None]:
    """Keeps programs out of the compile cache: one for devices that are not there could be written, but not read back."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def results_text(instruction: hlo.Instruction) -> str:
    """What an instruction gives, as in ``"bf16[8,4096], f32[8]"``."""
    return ", ".join(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in instruction.results)
