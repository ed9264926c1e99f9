// What the kernels of every instruction set offer, and the layout of packed weights.
//
// A matrix [N, K] is packed into blocks of 32 outputs; within a block units of 32 inputs follow each other, each unit holding its 32 x 32
// codes so that one vector register holds neighbouring outputs:
//
//   F32   [32 k][32 n] float                          4096 bytes a unit
//   F16   [32 k][32 n] half                           2048
//   BF16  [16 pairs][32 n][2 k] bfloat16              2048
//   8 bit [8 quads][32 n][4 k] bytes, k order 0 2 1 3 1024   (I8, E4M3, E5M2)
//   Q2    [2][32 n] words of 16 pairs                  256   field f of the lower half belongs to k = 16 h + 2f, of the upper to 16 h + 2f + 1
//   Q3    as Q2, then [32 n] words of 32 third bits    384   bit p of the lower half belongs to k = 2p, of the upper half to k = 2p + 1
//   4 bit [4 steps][32 n] words of 8 nibbles           512   nibble j of the lower half is k = 2j, of the upper half k = 2j + 1
//         of I4 integers, of E2M1 floats of two exponent bits and one of mantissa
//   Q5    as 4 bit, then [32 n] words of 32 fifth bits 640   as Q3's
//   Q6    as 4 bit, then [2][32 n] words of 16 pairs   768   as Q2's
//
// K is padded with zeros to a multiple of 32, N to a multiple of 32. Scales of groups are [N/32][K/group][32 n].
#pragma once
#include <cstddef>
#include <cstdint>

namespace tpllm {

enum class Format : int64_t { kF32 = 0, kF16 = 1, kBF16 = 2, kI8 = 3, kE4M3 = 4, kE5M2 = 5, kI4 = 6, kQ5 = 7, kQ6 = 8, kQ2 = 9, kQ3 = 10, kE2M1 = 11 };
enum class Dtype : int64_t { kF32 = 0, kF16 = 1, kBF16 = 2, kI8 = 3, kU8 = 4, kE4M3 = 5, kE8M0 = 6 };  // E8M0: bytes e that are 2^(e - 127)
// Whether a cache of this dtype has a scale for each head and token.
constexpr bool has_scales(Dtype dtype) { return dtype == Dtype::kI8 || dtype == Dtype::kE4M3; }
enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kClampedGlu = 4 };
// What gate and up of a gated MLP become: activation(gate) * up, or, of kClampedGlu, gate sigmoid(alpha gate) (up + 1) of a gate of at most limit and
// an up of at most limit in size.
struct Gating {
  Activation activation;
  float limit = 0, alpha = 0;
};

#if defined(__aarch64__)
typedef __fp16 Half;  // compilers before GCC 13 have no _Float16 here
#else
typedef _Float16 Half;
#endif

constexpr int kBlock = 32;  // outputs of a block, inputs of a unit

inline int64_t unit_bytes(Format format) {
  switch (format) {
    case Format::kF32: return 4096;
    case Format::kF16: case Format::kBF16: return 2048;
    case Format::kI8: case Format::kE4M3: case Format::kE5M2: return 1024;
    case Format::kI4: case Format::kE2M1: return 512;
    case Format::kQ5: return 640;
    case Format::kQ6: return 768;
    case Format::kQ2: return 256;
    case Format::kQ3: return 384;
  }
  return 0;
}

static inline int64_t item_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kI8 || dtype == Dtype::kU8 || dtype == Dtype::kE4M3 || dtype == Dtype::kE8M0 ? 1 : 2; }

// One packed matrix. w[n, k] = scale * (code - zero) + min, where scale and min are of k's group, or, with group == 0, of the output alone.
// Where super_scales is there, scales (and mins) are integers that it (and super_mins, subtracted) multiply: the two levels of K-quants. Mins that
// are bytes without super_mins are zeros: min = -scale * zero.
struct Weight {
  const uint8_t* codes;
  const void* scales;        // nullptr: 1
  const void* mins;          // nullptr: 0
  const void* super_scales;  // half, or nullptr
  const void* super_mins;    // half, or nullptr
  const void* bias;          // [N] of bias_dtype, or nullptr
  Format format;
  Dtype scale_dtype, min_dtype, bias_dtype;
  int64_t n, k, padded_k;
  int64_t group;        // 0: one scale an output
  int64_t super_group;  // inputs a super scale covers
  int64_t zero;         // what is taken from each code: 2, 4, 8, 16, 32 or 0 (of 2 to 6 bits); of I8, 1 where -128 may occur
  bool quantizes_input;  // activations become int8, one scale a row; 8-bit codes with one scale an output only

  int64_t num_units() const { return padded_k / kBlock; }
  int64_t num_blocks() const { return (n + kBlock - 1) / kBlock; }
  const uint8_t* block_codes(int64_t block) const { return codes + block * num_units() * unit_bytes(format); }
};

// Rows of activations, row major.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t num_rows, num_columns;
};

struct AttentionArgs {
  const void *q, *k, *v;            // [B, T, N, H], [B, T, K, H] twice, of dtype
  void *k_cache, *v_cache;          // [P, K, S, H] of cache_dtype: P pages of S tokens
  float *k_scales, *v_scales;       // [P, K, S], caches of int8 and e4m3 only
  const int32_t* positions;         // [B, T]
  const int32_t* rows;              // the row of the table of each of [B], or of [B, T]; nullptr: batch row b is row b
  const int32_t* pages;             // [R, L]; nullptr: row r is page r
  const float *cos, *sin;           // [B, T, R]; R = 0: no rotation
  const float* sinks;               // [N], one more logit of each softmax, whose value is zero; or nullptr
  void* out;                        // [B, T, N, H] of dtype
  Dtype dtype, cache_dtype;
  int64_t B, T, N, K, H, R, P, S;
  int64_t num_rows, L;  // of the table; L pages a row
  bool is_ragged;       // rows are of [B, T]
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

// Something that can be run in phases by several threads; see team.h.
class Team;

// The kernels of one instruction set. All may be called from any thread; the work is shared through the team.
struct Kernels {
  const char* name;
  void (*linear)(Team&, const Rows& x, const Weight* weights, const Rows* outs, int64_t num_weights);
  void (*gated_mlp)(Team&, const Rows& x, const Weight& gate, const Weight& up, const Weight& down, const Gating&, const Rows& out);
  void (*lookup)(Team&, const int32_t* tokens, const Weight& table, const Rows& out);
  void (*attention)(Team&, const AttentionArgs&);
  void (*rms_norm)(Team&, const Rows& x, const Rows* delta, const void* weight, Dtype weight_dtype, float eps, const Rows& out, const Rows* sum);
  void (*row_sums)(Team&, const Rows& x, float* out);  // x of float32
};

// The kernels that $TPLLM_ISA names, or the best that this processor runs; nullptr where TPLLM_ISA names none that it runs.
const Kernels* find_kernels(const char* name);
// The names of those that were built and run here, best first, separated by spaces.
const char* kernel_names();

}  // namespace tpllm
