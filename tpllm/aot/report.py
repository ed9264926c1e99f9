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
class ProgramMemory:
    """Bytes of one device.

    Attributes:
        argument_bytes, output_bytes: of a program's arguments and outputs.
        aliased_bytes: of the outputs that lie in an argument's memory.
        temporary_bytes: of its main memory that the program needs beside them while it runs.
        code_bytes: of the program itself.
    """

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """What is read off a compiled program.

    Attributes:
        memory: of one device.
        num_aliased: how many outputs lie in the memory of a donated argument.
        instructions: every one of its optimized HLO, that of one device.
    """

    memory: ProgramMemory
    num_aliased: int
    instructions: list[hlo.Instruction]

    @functools.cached_property
    def collectives(self) -> list[hlo.Instruction]:
        """What devices exchange."""
        return hlo.collectives(self.instructions)

    @functools.cached_property
    def materialized(self) -> list[hlo.Instruction]:
        """What is written into the devices' main memory."""
        return hlo.materialized(self.instructions)

    @property
    def custom_calls(self) -> list[str]:
        """The targets of calls to what XLA does not compile itself: kernels and libraries."""
        return [found.custom_call_target for found in self.instructions if found.op == "custom-call" and found.phase != "done"]

    @property
    def temporary_bytes(self) -> int:
        """Bytes of a device's main memory that it needs beside arguments and outputs while the program runs."""
        return self.memory.temporary_bytes

    def describe(self) -> dict[str, Any]:
        """Counts and bytes of one device, JSON-able."""
        counts = collections.Counter((found.op, results_text(found)) for found in self.collectives)
        return {"collectives": [{"op": op, "result": result, "count": count} for (op, result), count in counts.most_common()],
                "num_aliased": self.num_aliased, **dataclasses.asdict(self.memory)}


@dataclasses.dataclass(frozen=True)
class CompiledProgram(ProgramFacts):
    """One compiled program.

    Attributes:
        executable: what the compiler gave; runs only where the devices exist.
    """

    executable: jax.stages.Compiled


def compile_lowered(lowered: jax.stages.Lowered) -> ProgramFacts:
    """Run the compiler of the mesh's devices.

    Args:
        lowered: from :mod:`tpllm.aot.step_programs`, or of any other jitted function.

    Raises:
        MemoryNeedError: the compiler finds that the program does not fit into a device; what it needs and what there is.
    """
    return compile_all([lowered])[0]


def compile_all(lowered: Sequence[jax.stages.Lowered]) -> list[ProgramFacts]:
    """As :func:`compile_lowered` for several programs, side by side."""
    with _unstored(), concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
        return list(pool.map(compile_program, lowered))


def compile_program(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compile one program: the one place where all of them do, so that tests can put stored facts here; for :func:`compile_all`."""
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _OUT_OF_MEMORY.search(str(error)):
            raise MemoryNeedError(f"the program needs {found[1]}iB of each device, which has {found[2]}iB; lower max_model_len or max_num_seqs, "
                                  "take a smaller dtype or model, or a mesh of more devices") from error
        raise
    text, memory = executable.as_text(), executable.memory_analysis()
    return CompiledProgram(
        executable=executable, instructions=hlo.read_instructions(text), num_aliased=hlo.num_aliased(text),
        memory=ProgramMemory(memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes,
                             memory.generated_code_size_in_bytes))


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
