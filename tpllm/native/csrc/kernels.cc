// All kernels, compiled once for each instruction set: TPLLM_ISA names it, and the namespace that holds them.
#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "team.h"

namespace tpllm {
namespace TPLLM_ISA {

#include "simd.h"
#include "formats.h"
#include "tiles.h"
#include "matmul.h"
#include "products.h"
#include "attention_tiles.h"
#include "attention.h"
#include "norm.h"

#define TPLLM_TEXT_OF(x) #x
#define TPLLM_TEXT(x) TPLLM_TEXT_OF(x)

extern const Kernels kKernels;
const Kernels kKernels{TPLLM_TEXT(TPLLM_ISA), linear, gated_mlp, lookup, attention, rms_norm, row_sums};

}  // namespace TPLLM_ISA
}  // namespace tpllm
