"""Everything that is to be known on one NVIDIA GPU, in one command: kernels beside their peers, models end to end, and the plan's forecast.

  python -m benchmarks.gpu                       # from the root of the repository; under nine minutes on one H200, and without a network
  python -m benchmarks.gpu --only products ceilings
  python -m benchmarks.gpu --tiny                # the same with tiny shapes on a CPU: shows that it runs, measures nothing

It needs jax with CUDA; torch, transformers, triton and tokamax are peers, and absent ones are listed with the reason. What a section computes:

  correctness      every op's own list of cases on the device, each kernel against the float32 reference
  ceilings         copy bandwidth (bytes read and written) and rates of bfloat16, fp8 and int8 products: the best of XLA's and torch's
  flash_attention  causal, bfloat16, head dim 128, 2k and 8k: beside torch SDPA (flash, cuDNN), XLA with cuDNN, JAX's bundled kernels
                   and tokamax
  paged_attention  decode over pages, 64 rows of 4k and 8 rows of 32k: beside bandwidth and JAX's bundled kernel
  products         int8 and int4 weights at 1, 8 and 16 rows beside bfloat16's; 4096^3 in bfloat16 and fp8 beside cuBLAS and torch._scaled_mm
  fused            rms_norm and gated_mlp beside XLA's fusions and tokamax
  end_to_end       random weights of llama-3.1-8b's shape through the engine: decode of 1, 8 and 64 rows, prefill of 2k and 8k, in bfloat16, int8,
                   int4 and fp8, with the share of the measured bandwidth or rate
  transformers     the same shape in transformers, with torch.compile and a static cache, 1 and 8 rows
  plan             what tpllm plan says of those decodes beside what was measured

Ours and a peer alternate, and figures are medians. The bars of the benchmark stand beside each figure. A section or a side that fails is written
down with its error, and the rest goes on; what the budget of minutes left no time for is listed as not run. The exit code is 1 where a result was
wrong. Two processes share the GPU, one with JAX and one with torch, and take turns; one that hangs or dies is replaced.
"""
