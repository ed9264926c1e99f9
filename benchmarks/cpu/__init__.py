"""What this machine's CPU does, beside the runtimes that people would use instead; each is a command, run from the root of the repository.

  python -m benchmarks.cpu.vs_llama_cpp --shape tinyllama-1.1b      # decode, prefill and memory beside llama.cpp
  python -m benchmarks.cpu.vs_transformers --shape tinyllama-1.1b   # decode and prefill beside transformers
  python -m benchmarks.cpu.mixed_vs_peers                           # requests of mixed lengths beside both
  python -m benchmarks.cpu.soak                                     # an hour of changing work: memory that grows, a speed that falls

`peers/` runs the other side. The peers are packages of the extra `oracle`; what needs no peer, `tpllm bench` measures.
"""
