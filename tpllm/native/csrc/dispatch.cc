// Which kernels run on this processor.
#include <cstring>
#include <string>

#include "kernels.h"

namespace tpllm {

#define TPLLM_DECLARE(isa) namespace isa { extern const Kernels kKernels; }
#if defined(TPLLM_HAS_AVX512_BF16)
TPLLM_DECLARE(avx512_bf16)
#endif
#if defined(TPLLM_HAS_AVX512)
TPLLM_DECLARE(avx512)
#endif
#if defined(TPLLM_HAS_AVX2)
TPLLM_DECLARE(avx2)
#endif
#if defined(TPLLM_HAS_NEON)
TPLLM_DECLARE(neon)
#endif
TPLLM_DECLARE(portable)

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs_here;
};

// Best first.
const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C came before both
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  (void)has_bf16;
#endif
  static const Candidate all[] = {
#if defined(TPLLM_HAS_AVX512_BF16)
      {&avx512_bf16::kKernels, has_bf16},
#endif
#if defined(TPLLM_HAS_AVX512)
      {&avx512::kKernels, has_avx512},
#endif
#if defined(TPLLM_HAS_AVX2)
      {&avx2::kKernels, has_avx2},
#endif
#if defined(TPLLM_HAS_NEON)
      {&neon::kKernels, true},
#endif
      {&portable::kKernels, true},
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs_here && (!name || !*name || !std::strcmp(name, all[i].kernels->name))) return all[i].kernels;
  return nullptr;
}

const char* kernel_names() {
  static const std::string names = [] {
    int count;
    const Candidate* all = candidates(&count);
    std::string text;
    for (int i = 0; i < count; ++i)
      if (all[i].runs_here) text += (text.empty() ? "" : " ") + std::string(all[i].kernels->name);
    return text;
  }();
  return names.c_str();
}

}  // namespace tpllm
