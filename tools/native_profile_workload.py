"""What ``make native-tuned`` runs to see which paths of the native library are hot: a short generation with the demo model in bfloat16."""
import pathlib

import tpllm.native
from tpllm import LLM, SamplingParams

if not (pathlib.Path(tpllm.native.__file__).parent / "_kernels.so").exists():
    raise SystemExit("there is no native library to profile: `make native` builds it")
with LLM("demo", dtype="bfloat16") as llm:
    llm.generate(["def "], SamplingParams(temperature=0, max_tokens=32))
