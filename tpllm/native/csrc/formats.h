// How the codes of each format become floats (for every instruction set) or pairs of bfloat16 (where products of those exist). Both are
// exact: what is multiplied is the code itself, and scales are applied to sums. See kernels.h for the layouts.
//
// words(raw, j) are inputs 2j and 2j + 1 of integer codes as two int16, before the zero is taken from them.
//
// A step is 8 inputs. load() reads what a step of a unit needs for vector v of the 32 outputs; f32(raw, i) gives input i of it, pair(raw, j)
// inputs 2j and 2j + 1 as the two halves of each lane.

struct Tables {
  float zero;  // f32(): what is taken from each code
#if defined(__AVX512BF16__)
  __m512i low, high, more;  // pair(): the value of each code; of 8-bit codes the low and high bytes of each magnitude's, in two registers each
  __m512i more_high;
#endif
};

struct DenseF32 {
  static constexpr int kUnit = 4096;
  struct Raw { const uint8_t* at; };
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) { return {unit + step * 1024 + v * W * 4}; }
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables&) { return ::tpllm::TPLLM_ISA::load<vf>(raw.at + i * 128); }
};
struct DenseF16 {
  static constexpr int kUnit = 2048;
  struct Raw { const uint8_t* at; };
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) { return {unit + step * 512 + v * W * 2}; }
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables&) { return widen_f16(::tpllm::TPLLM_ISA::load<vh>(raw.at + i * 64)); }
};
struct DenseBF16 {
  static constexpr int kUnit = 2048;
  struct Raw { const uint8_t* at; };
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) { return {unit + step * 512 + v * W * 4}; }
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables&) {
    return widen_half(::tpllm::TPLLM_ISA::load<vu>(raw.at + (i / 2) * 128), i % 2);
  }
#if defined(__AVX512BF16__)
  static TPLLM_INLINE __m512i pair(const Raw& raw, int j, const Tables&) { return _mm512_loadu_si512(raw.at + j * 128); }
#endif
};

// The byte of input i among the four of a word: k order 0 2 1 3.
static constexpr int kByteOf[4] = {0, 2, 1, 3};

struct Bytes {
  static constexpr int kUnit = 1024;
  struct Raw { vu quads[2]; };
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) {
    const uint8_t* at = unit + step * 256 + v * W * 4;
    return {{::tpllm::TPLLM_ISA::load<vu>(at), ::tpllm::TPLLM_ISA::load<vu>(at + 128)}};
  }
  static TPLLM_INLINE vi signed_byte(const Raw& raw, int i) { return (vi)(raw.quads[i / 4] << (24 - 8 * kByteOf[i % 4])) >> 24; }
};

// What a panel of words holds.
struct DenseWords {
  static constexpr int kUnit = 2048;
  struct Raw { const uint8_t* at; };
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) { return {unit + step * 512 + v * W * 4}; }
  static TPLLM_INLINE vi words(const Raw& raw, int j) { return ::tpllm::TPLLM_ISA::load<vi>(raw.at + j * 128); }
};

struct I8 : Bytes {
  static constexpr bool kIsInteger = true;
  static TPLLM_INLINE vi words(const Raw& raw, int j) { return (vi)((j % 2 ? (vw)raw.quads[j / 2] : (vw)raw.quads[j / 2] << 8) >> 8); }
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables&) { return __builtin_convertvector(signed_byte(raw, i), vf); }
};
template <int kMantissa, int kBias>
struct Fp8 : Bytes {
  static constexpr bool kIsInteger = false;
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables&) { return widen_fp8<kMantissa, kBias>(signed_byte(raw, i)); }
};
using E4M3 = Fp8<3, 7>;
using E5M2 = Fp8<2, 15>;

#if defined(__AVX512BF16__)
static TPLLM_INLINE __m512i shift_words(__m512i words, int right) {
  return right >= 0 ? _mm512_srli_epi16(words, right) : _mm512_slli_epi16(words, -right);
}

// Eight bits to bfloat16 by tables of 128 magnitudes, one for each byte of the result.
template <class F, bool HAS_MINUS_128 = false>
struct BytesToPairs : F {
  using Raw = typename F::Raw;
  static TPLLM_INLINE __m512i pair(const Raw& raw, int j, const Tables& tables) {
    const __m512i codes = (__m512i)raw.quads[j / 2];
    const __m512i index = F::kIsInteger ? _mm512_abs_epi8(codes) : codes;
    const __m512i low = _mm512_permutex2var_epi8(tables.low, index, tables.more);
    __m512i high = _mm512_permutex2var_epi8(tables.high, index, tables.more_high);
    if constexpr (HAS_MINUS_128) high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(-128)), _mm512_set1_epi8(0x43));
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xF8);  // high | (codes & 0x80)
    const __m512i mask = _mm512_set1_epi16(0x00FF);
    return j % 2 == 0 ? _mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi16(high, 8), 0xCA)  // mask ? low : high
                      : _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xCA);
  }
};
#else
template <class F, bool HAS_MINUS_128 = false>
struct BytesToPairs : F {};
#endif

// Two bits of each code, and the third of Q3 in a plane behind them.
template <int kBits>
struct Pairs {
  static constexpr int kUnit = kBits == 2 ? 256 : 384;
  struct Raw { vu low, high; };  // the step's own fields lowest in each half
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) {
    Raw raw{::tpllm::TPLLM_ISA::load<vu>(unit + (step / 2) * 128 + v * W * 4) >> (step % 2 * 8), vu{}};
    if constexpr (kBits == 3) raw.high = ::tpllm::TPLLM_ISA::load<vu>(unit + 256 + v * W * 4) >> (step * 4);
    return raw;
  }
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables& tables) {
    const int j = i / 2, half = i % 2 * 16;
    vu code = (raw.low >> (2 * j + half)) & 3;
    if constexpr (kBits == 3) code |= ((raw.high >> (j + half)) & 1) << 2;
    return __builtin_convertvector((vi)code, vf) - splat(tables.zero);
  }
  static TPLLM_INLINE vi words(const Raw& raw, int j) {
    vu codes = (raw.low >> (2 * j)) & 0x00030003;
    if constexpr (kBits == 3) codes |= ((raw.high >> j) & 0x00010001) << 2;
    return (vi)codes;
  }
#if defined(__AVX512BF16__)
  // As of nibbles: the table repeats, so that bits above the code's do not matter.
  static TPLLM_INLINE __m512i pair(const Raw& raw, int j, const Tables& tables) {
    const __m512i low = shift_words((__m512i)raw.low, 2 * j);
    if constexpr (kBits == 2) return _mm512_permutexvar_epi16(low, tables.low);
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x0003), low, shift_words((__m512i)raw.high, j - 2), 0xCA);
    return _mm512_permutexvar_epi16(index, tables.low);
  }
#endif
};

// Nibbles that are floats: [sign][2 bits of exponent][1 of mantissa], 0 0.5 1 1.5 2 3 4 6 and their negatives.
static TPLLM_INLINE vf widen_e2m1(vu code) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  return (vf)_mm512_permutexvar_ps((__m512i)code, values);  // looks at the low 4 bits
#elif defined(__AVX2__)
  const __m256 sizes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);  // by the low 3 bits
  return as_float(as_bits((vf)_mm256_permutevar8x32_ps(sizes, (__m256i)code)) | ((code & 8) << 28));
#elif defined(__aarch64__)
  // The upper two bytes of each float, one table after the other; a float's lower bytes are the first byte of all.
  typedef uint8_t bytes __attribute__((vector_size(16)));
  const bytes first = {0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
  const bytes second = {0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0, 0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0};
  const vu nibble = code & 0xF;
  return (vf)__builtin_shuffle(first, second, (bytes)((nibble << 24) | (nibble << 16) | 0x00100000u));
#else
  return widen_fp8<1, 1>((vi)((code & 7) | ((code & 8) << 28)));
#endif
}

// Four low bits of each code, and the rest of Q5 and Q6 in planes behind them.
template <int kBits>
struct Nibbles {
  static constexpr int kUnit = kBits == 4 ? 512 : kBits == 5 ? 640 : 768;
  struct Raw { vu low, high; };  // the step's own bits of `high` lowest in each half
  static TPLLM_INLINE Raw load(const uint8_t* unit, int step, int v) {
    Raw raw{::tpllm::TPLLM_ISA::load<vu>(unit + step * 128 + v * W * 4), vu{}};
    if constexpr (kBits == 5) raw.high = ::tpllm::TPLLM_ISA::load<vu>(unit + 512 + v * W * 4) >> (step * 4);
    if constexpr (kBits == 6) raw.high = ::tpllm::TPLLM_ISA::load<vu>(unit + 512 + (step / 2) * 128 + v * W * 4) >> (step % 2 * 8);
    return raw;
  }
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables& tables) {
    const int j = i / 2, half = i % 2 * 16;
    vu code = (raw.low >> (4 * j + half)) & 0xF;
    if constexpr (kBits == 5) code |= ((raw.high >> (j + half)) & 1) << 4;
    if constexpr (kBits == 6) code |= ((raw.high >> (2 * j + half)) & 3) << 4;
    return __builtin_convertvector((vi)code, vf) - splat(tables.zero);
  }
  static TPLLM_INLINE vi words(const Raw& raw, int j) {
    vu codes = (raw.low >> (4 * j)) & 0x000F000F;
    if constexpr (kBits == 5) codes |= ((raw.high >> j) & 0x00010001) << 4;
    if constexpr (kBits == 6) codes |= ((raw.high >> (2 * j)) & 0x00030003) << 4;
    return (vi)codes;
  }
#if defined(__AVX512BF16__)
  static TPLLM_INLINE __m512i pair(const Raw& raw, int j, const Tables& tables) {
    const __m512i low = shift_words((__m512i)raw.low, 4 * j);
    // Words are looked up by their low 5 bits: the table of 4-bit codes stands there twice, so that the fifth bit does not matter.
    if constexpr (kBits == 4) return _mm512_permutexvar_epi16(low, tables.low);
    const __m512i mask = _mm512_set1_epi16(0x000F);
    const int place = kBits == 5 ? j - 4 : 2 * j - 4;
    const __m512i index = _mm512_ternarylogic_epi32(mask, low, shift_words((__m512i)raw.high, place), 0xCA);
    if constexpr (kBits == 5) return _mm512_permutexvar_epi16(index, tables.low);
    return _mm512_permutex2var_epi16(tables.low, index, tables.more);
  }
#endif
};

struct E2M1 : Nibbles<4> {
  static TPLLM_INLINE vf f32(const Raw& raw, int i, const Tables&) { return widen_e2m1(raw.low >> (4 * (i / 2) + i % 2 * 16)); }
};

#if defined(__AVX512BF16__)
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits >> 16;  // every code's value is exact
}
static inline float fp8_value(int magnitude, int mantissa, int bias) {
  const int exponent = magnitude >> mantissa, rest = magnitude & ((1 << mantissa) - 1);
  return exponent ? __builtin_ldexpf(1.0f + rest / float(1 << mantissa), exponent - bias) : __builtin_ldexpf(rest / float(1 << mantissa), 1 - bias);
}
#endif

static inline Tables make_tables(const Weight& weight) {
  Tables tables{};
  tables.zero = weight.zero;
#if defined(__AVX512BF16__)
  const bool is_integer = weight.format == Format::kI8, is_e4m3 = weight.format == Format::kE4M3;
  if (is_integer || is_e4m3 || weight.format == Format::kE5M2) {
    alignas(64) uint8_t low[128], high[128];
    for (int i = 0; i < 128; ++i) {
      const uint16_t bits = to_bf16(is_integer ? i : is_e4m3 ? fp8_value(i, 3, 7) : fp8_value(i, 2, 15));
      low[i] = bits & 0xFF, high[i] = bits >> 8;
    }
    tables.low = _mm512_load_si512(low), tables.more = _mm512_load_si512(low + 64);
    tables.high = _mm512_load_si512(high), tables.more_high = _mm512_load_si512(high + 64);
  } else {
    alignas(64) uint16_t values[64];
    const int num_codes = weight.format == Format::kQ2 ? 4 : weight.format == Format::kQ3 ? 8 : weight.format == Format::kQ6 ? 64 : weight.format == Format::kQ5 ? 32 : 16;
    for (int i = 0; i < 64; ++i) {
      const float size = fp8_value(i % 8, 1, 1);
      values[i] = to_bf16(weight.format != Format::kE2M1 ? float(i % num_codes - weight.zero) : i % 16 < 8 ? size : -size);
    }
    tables.low = _mm512_load_si512(values), tables.more = _mm512_load_si512(values + 32);
  }
#endif
  return tables;
}
