// Vectors of this instruction set: GCC's vector extensions, and intrinsics where they say more. Included by kernels.cc only, inside the
// namespace of the instruction set, so that no inline function of one set is linked in place of another's.

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int V = kBlock / W;  // vectors of a block's outputs

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int16_t vw __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef int8_t vsb __attribute__((vector_size(W)));

#define TPLLM_INLINE inline __attribute__((always_inline))
#define TPLLM_UNROLL _Pragma("GCC unroll 16")
#define TPLLM_ROLL _Pragma("GCC unroll 1")
#define TPLLM_INLINE_LAMBDA __attribute__((always_inline))

template <class T>
static TPLLM_INLINE T load(const void* from) {
  T x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
template <class T>
static TPLLM_INLINE void store(void* to, T x) {
  __builtin_memcpy(to, &x, sizeof x);
}
// Fetches what is read later to the second cache: the processor's own prefetching stops at the end of a page, and the first cache waits for few
// lines at once. A little at a time, for only so many can be under way.
static TPLLM_INLINE void prefetch(const uint8_t* from, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}
static TPLLM_INLINE vf splat(float x) { return x - vf{}; }
static TPLLM_INLINE vu splat_bits(uint32_t x) { return x - vu{}; }
static TPLLM_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
static TPLLM_INLINE vf as_float(vu x) { return (vf)x; }
static TPLLM_INLINE vu as_bits(vf x) { return (vu)x; }
static TPLLM_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
static TPLLM_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }

// All lanes, halves onto halves: the same tree for every row.
template <int HALF, class OP>
static TPLLM_INLINE vf reduce_step(vf x, OP op) {
  vi from;
  for (int i = 0; i < W; ++i) from[i] = i ^ HALF;
  return op(x, __builtin_shuffle(x, from));
}
template <class OP>
static TPLLM_INLINE float reduce(vf x, OP op) {
  if constexpr (W >= 16) x = reduce_step<8>(x, op);
  if constexpr (W >= 8) x = reduce_step<4>(x, op);
  x = reduce_step<2>(x, op);
  return reduce_step<1>(x, op)[0];
}
static TPLLM_INLINE float reduce_add(vf x) { return reduce(x, [](vf a, vf b) { return a + b; }); }
static TPLLM_INLINE float reduce_max(vf x) { return reduce(x, [](vf a, vf b) { return vmax(a, b); }); }

// --- narrow integers -------------------------------------------------------------------------------------------------------------------
// __builtin_convertvector makes several instructions of these.
static TPLLM_INLINE vu widen(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
static TPLLM_INLINE vi widen(vsb x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vi);
#endif
}
static TPLLM_INLINE vi widen(vb x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vi);
#endif
}
static TPLLM_INLINE vh narrow(vu x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, vh);
#endif
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------------------------
static TPLLM_INLINE vf widen_bf16(vh x) { return as_float(widen(x) << 16); }
static TPLLM_INLINE vf widen_half(vu pairs, int half) { return as_float(half ? pairs & 0xFFFF0000u : pairs << 16); }  // of pairs of bfloat16
static TPLLM_INLINE vf widen_f16(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  const vu bits = widen(x), magnitude = (bits & 0x7FFF) << 13;
  const vi is_small = (vi)(magnitude < (0x0400u << 13)), is_special = (vi)(magnitude >= (0x7C00u << 13));
  const vf normal = as_float(magnitude + (112u << 23));
  const vf small = as_float(magnitude + (113u << 23)) - as_float(splat_bits(113u << 23));  // subnormal halves are normal floats
  const vf special = as_float(magnitude | 0x7F800000u);
  return as_float(as_bits(select(is_special, special, select(is_small, small, normal))) | ((bits & 0x8000) << 16));
#endif
}
static TPLLM_INLINE vh narrow_bf16(vf x) {  // to the nearest, ties to even; a NaN stays one
  const vu bits = as_bits(x);
  const vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  const vu is_nan = (vu)(x != x);
  return narrow((rounded & ~is_nan) | (nan & is_nan));
}
static TPLLM_INLINE uint16_t narrow_f16_one(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  Half half = (Half)x;
  uint16_t bits;
  __builtin_memcpy(&bits, &half, 2);
  return bits;
#endif
}
static TPLLM_INLINE vh narrow_f16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, 0);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, 0);
#else
  vh out;
  for (int i = 0; i < W; ++i) out[i] = narrow_f16_one(x[i]);
  return out;
#endif
}

// fp8 (Micikevicius et al. 2022, arXiv:2209.05433): the bits of a float with fewer of them; subnormals lose their implicit one.
template <int kMantissa, int kBias>
static TPLLM_INLINE vf widen_fp8(vi code) {
  const vu magnitude = (vu)code & 0x7F;
  const vu is_small = (vu)((vi)magnitude < (1 << kMantissa));
  const vu exponent = ((127u - kBias) << 23) + (is_small & (1u << 23));
  const vf value = as_float((magnitude << (23 - kMantissa)) + exponent) - as_float(is_small & ((128u - kBias) << 23));
  return as_float(as_bits(value) | ((vu)code & 0x80000000u));
}
// To the nearest, ties to even; x is at most 448 in size.
static TPLLM_INLINE uint8_t narrow_e4m3_one(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint8_t sign = bits >> 24 & 0x80;
  const float size = __builtin_fabsf(x);
  if (size < 0.015625f) return sign | static_cast<uint8_t>(size * 512.0f + 12582912.0f - 12582912.0f);  // below 2^-6: steps of 2^-9
  bits &= 0x7FFFFFFF;
  return sign | static_cast<uint8_t>(((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

static TPLLM_INLINE const void* item_at(const void* data, Dtype dtype, int64_t index) {
  return static_cast<const uint8_t*>(data) + index * item_bytes(dtype);
}
static TPLLM_INLINE void* item_at(void* data, Dtype dtype, int64_t index) { return static_cast<uint8_t*>(data) + index * item_bytes(dtype); }

static TPLLM_INLINE vf load_as_f32(const void* from, Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32: return load<vf>(from);
    case Dtype::kF16: return widen_f16(load<vh>(from));
    case Dtype::kBF16: return widen_bf16(load<vh>(from));
    case Dtype::kI8: return __builtin_convertvector(widen(load<vsb>(from)), vf);
    case Dtype::kU8: return __builtin_convertvector(widen(load<vb>(from)), vf);
    case Dtype::kE4M3: return widen_fp8<3, 7>(widen(load<vsb>(from)));
    case Dtype::kE8M0: return as_float((vu)widen(load<vb>(from)) << 23);  // 2^-127 counts as 0
  }
  return vf{};
}
static TPLLM_INLINE void store_as(void* to, Dtype dtype, vf x) {
  if (dtype == Dtype::kF32) store(to, x);
  else if (dtype == Dtype::kF16) store(to, narrow_f16(x));
  else store(to, narrow_bf16(x));
}

// count floats (any number) to or from an array of some dtype.
static inline void widen_row(const void* from, Dtype dtype, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load_as_f32(item_at(from, dtype, i), dtype));
  if (i < count) {
    alignas(64) uint8_t bytes[W * 4] = {};
    __builtin_memcpy(bytes, item_at(from, dtype, i), (count - i) * item_bytes(dtype));
    float last[W];
    store(last, load_as_f32(bytes, dtype));
    __builtin_memcpy(to + i, last, (count - i) * 4);
  }
}
static inline void narrow_row(const float* from, int64_t count, Dtype dtype, void* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store_as(item_at(to, dtype, i), dtype, load<vf>(from + i));
  if (i < count) {
    float last[W] = {};
    alignas(64) uint8_t bytes[W * 4];
    __builtin_memcpy(last, from + i, (count - i) * 4);
    store_as(bytes, dtype, load<vf>(last));
    __builtin_memcpy(item_at(to, dtype, i), bytes, (count - i) * item_bytes(dtype));
  }
}

// --- elementary functions ---------------------------------------------------------------------------------------------------------------
// e^x: x = n ln 2 + r, a polynomial of degree 6 in r (its error is below 2 units of the last place), times 2^n. Below -87 it is 0.
static TPLLM_INLINE vf exp(vf x) {
  const vi is_tiny = x < -87.0f;
  const vi is_huge = x > 88.0f;
  vf clamped = select(is_tiny, splat(-87.0f), select(is_huge, splat(88.0f), x));
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vf n_shifted = fma(clamped, splat(1.44269504088896341f), shifter);
  const vf n = n_shifted - shifter;
  vf r = fma(n, splat(-0.693145751953125f), clamped);
  r = fma(n, splat(-1.42860682030941723212e-6f), r);
  vf y = splat(1.0f / 720);
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  const vu power = (as_bits(n_shifted) + 127) << 23;  // the low bits of n_shifted are n
  y = y * as_float(power);
  y = select(is_tiny, splat(0.0f), y);
  y = select(is_huge, splat(__builtin_inff()), y);
  return select(x != x, x, y);
}
static TPLLM_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }
static TPLLM_INLINE vf tanh(vf x) { return splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp(x + x)); }
static TPLLM_INLINE vf erf_scalar(vf x) {
  vf y;
  for (int i = 0; i < W; ++i) y[i] = __builtin_erff(x[i]);
  return y;
}
static TPLLM_INLINE vf activate(vf x, Activation kind) {
  switch (kind) {
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kGelu: return splat(0.5f) * x * (splat(1.0f) + erf_scalar(x * splat(0.70710678118654752f)));
    case Activation::kGeluTanh: {
      const vf inner = splat(0.79788456080286536f) * fma(splat(0.044715f) * x * x, x, x);
      return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
    }
    case Activation::kRelu: return vmax(x, vf{});
    case Activation::kClampedGlu: break;  // of gate and up together: see gated()
  }
  return x;
}
static TPLLM_INLINE vf at_most(vf x, float limit) { return select(x > splat(limit), splat(limit), x); }
static TPLLM_INLINE vf gated(vf gate, vf up, const Gating& gating) {
  if (gating.activation != Activation::kClampedGlu) return activate(gate, gating.activation) * up;
  const vf g = at_most(gate, gating.limit), u = -at_most(-at_most(up, gating.limit), gating.limit);
  return g * sigmoid(splat(gating.alpha) * g) * (u + splat(1.0f));
}
