// Products of a few or many rows with packed weights.
//
// Every output of every row is one chain of sums over its inputs in order, the same for any number of rows: of a group's codes times
// activations, folded with the group's scale into the sum of the groups before it. So results do not depend on how rows are batched.

enum Fold { kNoGroups = 0, kWholeUnits = 1, kHalfUnits = 2 };

// The scales of one block's groups.
struct Scaler {
  const uint8_t *scales, *mins, *super_scales, *super_mins;  // of the block
  Dtype dtype, min_dtype;
  int64_t units_a_group;
  int groups_a_super_log2;

  Scaler(const Weight& w, int64_t block)
      : dtype(w.scale_dtype), min_dtype(w.min_dtype), units_a_group(w.group / kBlock), groups_a_super_log2(0) {
    const int64_t num_groups = w.group ? w.padded_k / w.group : 0;
    const int64_t num_supers = w.super_group ? (w.padded_k + w.super_group - 1) / w.super_group : 0;
    while (w.super_group > w.group << groups_a_super_log2) ++groups_a_super_log2;
    auto of_block = [block](const void* base, int64_t count, int64_t bytes) {
      return base ? static_cast<const uint8_t*>(base) + block * count * kBlock * bytes : nullptr;
    };
    scales = of_block(w.scales, num_groups, item_bytes(dtype)), mins = of_block(w.mins, num_groups, item_bytes(min_dtype));
    super_scales = of_block(w.super_scales, num_supers, 2), super_mins = of_block(w.super_mins, num_supers, 2);
  }
  TPLLM_INLINE vf own(const uint8_t* base, Dtype own_dtype, int64_t group, int v) const {
    return load_as_f32(base + (group * kBlock + v * W) * item_bytes(own_dtype), own_dtype);
  }
  TPLLM_INLINE vf super(const uint8_t* base, int64_t group, int v) const {
    return widen_f16(load<vh>(base + ((group >> groups_a_super_log2) * kBlock + v * W) * 2));
  }
  TPLLM_INLINE vf scale(int64_t group, int v) const {
    const vf own_scale = own(scales, dtype, group, v);
    return super_scales ? own_scale * super(super_scales, group, v) : own_scale;
  }
  TPLLM_INLINE vf min(int64_t group, int v) const {
    const vf own_min = own(mins, min_dtype, group, v);
    if (super_mins) return -(own_min * super(super_mins, group, v));
    return min_dtype == Dtype::kU8 ? -(own_min * scale(group, v)) : own_min;
  }
};

struct TileArgs {
  const uint8_t* codes;  // of the first unit
  const uint32_t* x;     // of the first unit: [dwords][M]
  const float* sums;     // of the first unit: [units][M]
  float* acc;            // [M][32]
  int64_t first_unit, num_units;
  const Scaler* scaler;
  const Tables* tables;
  const float* unit_scales;  // of int16 activations, of the first unit: [units][M]
  const int32_t* half_sums;  // of int16 activations, of the first unit: [units][2][M]
  int64_t zero;              // what is taken from each code before int16 activations multiply it
};

// The sums of the groups so far: in registers where there are enough for them, in memory else.
template <int M>
struct Totals {
  static constexpr bool kInRegisters = M <= 4;
  float* acc;
  vf held[kInRegisters ? M : 1][V];

  explicit TPLLM_INLINE Totals(float* memory) : acc(memory) {
    if constexpr (kInRegisters)
      TPLLM_UNROLL for (int m = 0; m < M; ++m)
        TPLLM_UNROLL for (int v = 0; v < V; ++v) held[m][v] = load<vf>(acc + m * kBlock + v * W);
  }
  TPLLM_INLINE void add(int m, int v, vf scale, vf x) {
    if constexpr (kInRegisters) held[m][v] = fma(scale, x, held[m][v]);
    else store(acc + m * kBlock + v * W, fma(scale, x, load<vf>(acc + m * kBlock + v * W)));
  }
  TPLLM_INLINE void write() const {
    if constexpr (kInRegisters)
      TPLLM_UNROLL for (int m = 0; m < M; ++m)
        TPLLM_UNROLL for (int v = 0; v < V; ++v) store(acc + m * kBlock + v * W, held[m][v]);
  }
};

template <int M>
static TPLLM_INLINE void fold_group(const Scaler& scaler, int64_t group, const float* sums, vf (&partial)[M][V], Totals<M>& totals) {
  TPLLM_UNROLL for (int v = 0; v < V; ++v) {
    const vf scale = scaler.scale(group, v);
    TPLLM_UNROLL for (int m = 0; m < M; ++m) totals.add(m, v, scale, partial[m][v]), partial[m][v] = vf{};
  }
  if (!scaler.mins) return;
  vf min[V];
  TPLLM_UNROLL for (int v = 0; v < V; ++v) min[v] = scaler.min(group, v);
  TPLLM_UNROLL for (int m = 0; m < M; ++m) {
    float sum = 0;
    for (int64_t unit = 0; unit < scaler.units_a_group; ++unit) sum += sums[unit * M + m];
    TPLLM_UNROLL for (int v = 0; v < V; ++v) totals.add(m, v, min[v], splat(sum));
  }
}

constexpr int kPrefetchBytes = 16384;  // ahead of what is read

template <class F>
static TPLLM_INLINE void prefetch_step(const uint8_t* unit, int step) {
  prefetch(unit + step * (F::kUnit / 4) + kPrefetchBytes, F::kUnit / 4);
}

// How the products of a step are added to `partial`: at once, or as whole numbers that are turned into floats at the end of a part of the unit.
template <class F, int M>
struct FloatMath {
  TPLLM_INLINE void begin(const TileArgs&, int64_t, int, int) {}
  TPLLM_INLINE void end(const TileArgs&, int64_t, vf (&)[M][V]) {}
  TPLLM_INLINE void step(const uint8_t* unit, int step, const uint32_t* x, const Tables& tables, vf (&partial)[M][V]) {
    typename F::Raw raw[V];
    TPLLM_UNROLL for (int v = 0; v < V; ++v) raw[v] = F::load(unit, step, v);
    TPLLM_UNROLL for (int i = 0; i < 8; ++i) {
      vf xm[M];
      TPLLM_UNROLL for (int m = 0; m < M; ++m) xm[m] = splat(load<float>(x + (step * 8 + i) * M + m));
      TPLLM_UNROLL for (int v = 0; v < V; ++v) {
        const vf w = F::f32(raw[v], i, tables);
        TPLLM_UNROLL for (int m = 0; m < M; ++m) partial[m][v] = fma(w, xm[m], partial[m][v]);
      }
    }
  }
  static constexpr int kDwords = 32;
  static constexpr bool kIsShort = false;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// With 16 registers GCC would begin the products of later inputs before it has added these, and have no register for them.
template <int M>
static TPLLM_INLINE void stay_in_order(vi (&sums)[M][V]) {
  TPLLM_UNROLL for (int m = 0; m < M; ++m)
    TPLLM_UNROLL for (int v = 0; v < V; ++v) asm("" : "+x"(sums[m][v]));
}

template <class F, int M>
struct WordMath {
  vi sums[M][V];
  const float* scales;

  TPLLM_INLINE void begin(const TileArgs& a, int64_t unit, int half, int num_halves) {
    const int32_t* halves = a.half_sums + unit * 2 * M + half * M;
    TPLLM_UNROLL for (int m = 0; m < M; ++m) {
      const int32_t sum = num_halves == 2 ? halves[m] + halves[M + m] : halves[m];
      TPLLM_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = vi{} - static_cast<int32_t>(a.zero) * sum;
    }
  }
  TPLLM_INLINE void end(const TileArgs& a, int64_t unit, vf (&partial)[M][V]) {
    TPLLM_UNROLL for (int m = 0; m < M; ++m)
      TPLLM_UNROLL for (int v = 0; v < V; ++v)
        partial[m][v] = fma(__builtin_convertvector(sums[m][v], vf), splat(a.unit_scales[unit * M + m]), partial[m][v]);
  }
  TPLLM_INLINE void step(const uint8_t* unit, int step, const uint32_t* x, const Tables&, vf (&)[M][V]) {
    typename F::Raw raw[V];
    TPLLM_UNROLL for (int v = 0; v < V; ++v) raw[v] = F::load(unit, step, v);
    TPLLM_UNROLL for (int j = 0; j < 4; ++j) {
      __m256i xm[M];
      TPLLM_UNROLL for (int m = 0; m < M; ++m) xm[m] = _mm256_set1_epi32(load<int32_t>(x + (step * 4 + j) * M + m));
      TPLLM_UNROLL for (int v = 0; v < V; ++v) {
        const __m256i w = (__m256i)F::words(raw[v], j);
        TPLLM_UNROLL for (int m = 0; m < M; ++m) sums[m][v] += (vi)_mm256_madd_epi16(w, xm[m]);
      }
      stay_in_order<M>(sums);
    }
  }
  static constexpr int kDwords = 16;
  static constexpr bool kIsShort = true;
};
#endif

#if defined(__AVX512BF16__)
template <class F, int M>
struct PairMath {
  TPLLM_INLINE void begin(const TileArgs&, int64_t, int, int) {}
  TPLLM_INLINE void end(const TileArgs&, int64_t, vf (&)[M][V]) {}
  TPLLM_INLINE void step(const uint8_t* unit, int step, const uint32_t* x, const Tables& tables, vf (&partial)[M][V]) {
    typename F::Raw raw[V];
    TPLLM_UNROLL for (int v = 0; v < V; ++v) raw[v] = F::load(unit, step, v);
    TPLLM_UNROLL for (int j = 0; j < 4; ++j) {
      __m512i w[V];
      TPLLM_UNROLL for (int v = 0; v < V; ++v) w[v] = F::pair(raw[v], j, tables);
      TPLLM_UNROLL for (int m = 0; m < M; ++m) {
        const __m512i xm = _mm512_set1_epi32(load<int32_t>(x + (step * 4 + j) * M + m));
        TPLLM_UNROLL for (int v = 0; v < V; ++v)
          partial[m][v] = (vf)_mm512_dpbf16_ps((__m512)partial[m][v], (__m512bh)w[v], (__m512bh)xm);
      }
    }
  }
  static constexpr int kDwords = 16;
  static constexpr bool kIsShort = false;
};
#endif

// Whether the steps of a unit are written out, which takes long to compile: where they are so short that counting them would be felt, and for the whole
// numbers of AVX2, by up to 3 %.
template <class MATH, int M>
constexpr bool kUnrollsSteps = MATH::kIsShort || M * V <= 4;

// Adds the products of some units to acc.
template <class F, int FOLD, bool PREFETCHES, int M, template <class, int> class MATH>
static void run_tile(const TileArgs& a) {
  const Tables tables = *a.tables;
  const Scaler& scaler = *a.scaler;
  vf partial[M][V];
  TPLLM_UNROLL for (int m = 0; m < M; ++m)
    TPLLM_UNROLL for (int v = 0; v < V; ++v) partial[m][v] = FOLD == kNoGroups ? load<vf>(a.acc + m * kBlock + v * W) : vf{};
  Totals<M> totals(a.acc);
  const int64_t units_a_group = FOLD == kWholeUnits ? scaler.units_a_group : 1;
  int64_t in_group = 0, group = FOLD == kHalfUnits ? 2 * a.first_unit : a.first_unit / units_a_group;
  constexpr int kParts = FOLD == kHalfUnits ? 2 : 1;  // of a unit
  MATH<F, M> math;
  for (int64_t u = 0; u < a.num_units; ++u) {
    const uint8_t* unit = a.codes + u * F::kUnit;
    const uint32_t* x = a.x + u * MATH<F, M>::kDwords * M;
    const auto run_step = [&](int step) TPLLM_INLINE_LAMBDA {
      if constexpr (PREFETCHES) prefetch_step<F>(unit, step);
      math.step(unit, step, x, tables, partial);
    };
    TPLLM_UNROLL for (int part = 0; part < kParts; ++part) {
      math.begin(a, u, part, 2 / kParts);
      const int first = part * 2, last = first + 4 / kParts;
      if constexpr (kUnrollsSteps<MATH<F, M>, M>) TPLLM_UNROLL for (int step = first; step < last; ++step) run_step(step);
      else TPLLM_ROLL for (int step = first; step < last; ++step) run_step(step);
      math.end(a, u, partial);
      if constexpr (FOLD == kHalfUnits) fold_group<M>(scaler, group++, a.sums, partial, totals);
    }
    if constexpr (FOLD == kWholeUnits)
      if (++in_group == units_a_group) {
        fold_group<M>(scaler, group++, a.sums + (u - units_a_group + 1) * M, partial, totals);
        in_group = 0;
      }
  }
  if constexpr (FOLD == kNoGroups) {
    TPLLM_UNROLL for (int m = 0; m < M; ++m)
      TPLLM_UNROLL for (int v = 0; v < V; ++v) store(a.acc + m * kBlock + v * W, partial[m][v]);
  } else {
    totals.write();
  }
}

// int8 activations times 8-bit codes with one scale an output: acc holds whole numbers, and sums are exact in any order.
template <int M>
static void run_byte_tile(const TileArgs& a) {
  vi sums[M][V];
  TPLLM_UNROLL for (int m = 0; m < M; ++m)
    TPLLM_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = load<vi>(a.acc + m * kBlock + v * W);
  for (int64_t u = 0; u < a.num_units; ++u)
    for (int quad = 0; quad < 8; ++quad) {
      const uint8_t* at = a.codes + u * Bytes::kUnit + quad * 128;
      prefetch(at + kPrefetchBytes, 128);
      const uint32_t* x = a.x + (u * 8 + quad) * M;
#if defined(__AVX512VNNI__)
      __m512i w[V];
      TPLLM_UNROLL for (int v = 0; v < V; ++v) w[v] = _mm512_xor_si512(_mm512_loadu_si512(at + v * 64), _mm512_set1_epi8(-128));
      TPLLM_UNROLL for (int m = 0; m < M; ++m) {
        const __m512i xm = _mm512_set1_epi32(load<int32_t>(x + m));
        TPLLM_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = (vi)_mm512_dpbusd_epi32((__m512i)sums[m][v], w[v], xm);  // (code + 128) * x
      }
#else
      TPLLM_UNROLL for (int i = 0; i < 4; ++i)
        TPLLM_UNROLL for (int v = 0; v < V; ++v) {
          const vi w = ((vi)(load<vu>(at + v * W * 4) << (24 - 8 * i)) >> 24) + 128;
          TPLLM_UNROLL for (int m = 0; m < M; ++m) sums[m][v] += w * (static_cast<int32_t>(load<uint32_t>(x + m) << (24 - 8 * i)) >> 24);
        }
#endif
    }
  TPLLM_UNROLL for (int m = 0; m < M; ++m)
    TPLLM_UNROLL for (int v = 0; v < V; ++v) store(a.acc + m * kBlock + v * W, sums[m][v]);
}

// Decodes units into a panel of the dense format, to be used for many tiles.
template <class F>
static void fill_float_panel(const uint8_t* codes, int64_t num_units, const Tables& given, uint8_t* panel) {
  const Tables tables = given;
  for (int64_t u = 0; u < num_units; ++u)
    TPLLM_ROLL for (int step = 0; step < 4; ++step)
      TPLLM_UNROLL for (int v = 0; v < V; ++v) {
        const auto raw = F::load(codes + u * F::kUnit, step, v);
        TPLLM_UNROLL for (int i = 0; i < 8; ++i) store(panel + u * 4096 + (step * 8 + i) * 128 + v * W * 4, F::f32(raw, i, tables));
      }
}
#if defined(__AVX512BF16__)
template <class F>
static void fill_pair_panel(const uint8_t* codes, int64_t num_units, const Tables& given, uint8_t* panel) {
  const Tables tables = given;
  for (int64_t u = 0; u < num_units; ++u)
    TPLLM_ROLL for (int step = 0; step < 4; ++step)
      TPLLM_UNROLL for (int v = 0; v < V; ++v) {
        const auto raw = F::load(codes + u * F::kUnit, step, v);
        TPLLM_UNROLL for (int j = 0; j < 4; ++j) _mm512_storeu_si512(panel + u * 2048 + (step * 4 + j) * 128 + v * 64, F::pair(raw, j, tables));
      }
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class F>
static void fill_word_panel(const uint8_t* codes, int64_t num_units, const Tables&, uint8_t* panel) {
  for (int64_t u = 0; u < num_units; ++u)
    TPLLM_UNROLL for (int step = 0; step < 4; ++step)
      TPLLM_UNROLL for (int v = 0; v < V; ++v) {
        const auto raw = F::load(codes + u * F::kUnit, step, v);
        TPLLM_UNROLL for (int j = 0; j < 4; ++j) store(panel + u * 2048 + (step * 4 + j) * 128 + v * W * 4, F::words(raw, j));
      }
}
#endif

using TileFunction = void (*)(const TileArgs&);
using PanelFunction = void (*)(const uint8_t*, int64_t, const Tables&, uint8_t*);

// What multiplies one format: tiles straight from the codes, or tiles from a panel.
struct Method {
  TileFunction direct[kNumTileSizes], from_panel[kNumTileSizes];
  PanelFunction fill_panel;  // nullptr: the codes are the panel
  int64_t panel_unit_bytes;
};

template <class F, int FOLD, bool PREFETCHES, template <class, int> class MATH, int... I>
static void set_tiles(TileFunction* tiles, std::integer_sequence<int, I...>) {
  ((tiles[I] = run_tile<F, FOLD, PREFETCHES, kTileSizes[I], MATH>), ...);
}

template <class F, int FOLD, template <class, int> class MATH, class PANEL>
static Method make_method(PanelFunction fill, int64_t panel_unit_bytes) {
  Method method{{}, {}, fill, panel_unit_bytes};
  set_tiles<F, FOLD, true, MATH>(method.direct, std::make_integer_sequence<int, kNumTileSizes>());
  set_tiles<PANEL, FOLD, false, MATH>(method.from_panel, std::make_integer_sequence<int, kNumTileSizes>());
  return method;
}

template <class F>
static Method float_method(int fold) {
  const PanelFunction fill = std::is_same_v<F, DenseF32> ? nullptr : fill_float_panel<F>;
  if constexpr (std::is_same_v<F, DenseF32> || std::is_same_v<F, DenseF16> || std::is_same_v<F, DenseBF16>)
    return make_method<F, kNoGroups, FloatMath, DenseF32>(fill, 4096);
  else if constexpr (std::is_same_v<F, Nibbles<6>> || std::is_same_v<F, E2M1>)
    return fold == kHalfUnits ? make_method<F, kHalfUnits, FloatMath, DenseF32>(fill, 4096) : make_method<F, kWholeUnits, FloatMath, DenseF32>(fill, 4096);
  else if constexpr (std::is_same_v<F, Nibbles<5>> || std::is_same_v<F, Pairs<2>> || std::is_same_v<F, Pairs<3>>)
    return make_method<F, kWholeUnits, FloatMath, DenseF32>(fill, 4096);
  else
    return fold == kNoGroups ? make_method<F, kNoGroups, FloatMath, DenseF32>(fill, 4096) : make_method<F, kWholeUnits, FloatMath, DenseF32>(fill, 4096);
}

#if defined(__AVX512BF16__)
template <class F>
static Method pair_method(int fold) {
  const PanelFunction fill = std::is_same_v<F, DenseBF16> ? nullptr : fill_pair_panel<F>;
  if constexpr (std::is_same_v<F, DenseBF16>)
    return make_method<F, kNoGroups, PairMath, DenseBF16>(fill, 2048);
  else if constexpr (std::is_same_v<F, Nibbles<6>> || std::is_same_v<F, E2M1>)
    return fold == kHalfUnits ? make_method<F, kHalfUnits, PairMath, DenseBF16>(fill, 2048) : make_method<F, kWholeUnits, PairMath, DenseBF16>(fill, 2048);
  else if constexpr (std::is_same_v<F, Nibbles<5>> || std::is_same_v<F, Pairs<2>> || std::is_same_v<F, Pairs<3>>)
    return make_method<F, kWholeUnits, PairMath, DenseBF16>(fill, 2048);
  else
    return fold == kNoGroups ? make_method<F, kNoGroups, PairMath, DenseBF16>(fill, 2048) : make_method<F, kWholeUnits, PairMath, DenseBF16>(fill, 2048);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class F>
static Method word_method(int fold) {
  if constexpr (std::is_same_v<F, Nibbles<6>>)
    if (fold == kHalfUnits) return make_method<F, kHalfUnits, WordMath, DenseWords>(fill_word_panel<F>, 2048);
  if constexpr (std::is_same_v<F, I8> || std::is_same_v<F, Nibbles<4>>)
    if (fold == kNoGroups) return make_method<F, kNoGroups, WordMath, DenseWords>(fill_word_panel<F>, 2048);
  return make_method<F, kWholeUnits, WordMath, DenseWords>(fill_word_panel<F>, 2048);
}
#endif

template <int... I>
static void set_byte_tiles(TileFunction* tiles, std::integer_sequence<int, I...>) { ((tiles[I] = run_byte_tile<kTileSizes[I]>), ...); }

static Math choose_math(const Weight& weight, [[maybe_unused]] Dtype x_dtype) {
  if (weight.quantizes_input) return Math::kBytes;
#if defined(__AVX512BF16__)
  if (x_dtype == Dtype::kBF16 && weight.format != Format::kF32 && weight.format != Format::kF16) return Math::kPairs;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  const bool is_integer = weight.format == Format::kI8 || (weight.format >= Format::kI4 && weight.format <= Format::kQ3);
  if (x_dtype != Dtype::kF32 && is_integer) return Math::kWords;
#endif
  return Math::kFloats;
}

static Method choose_method(const Weight& weight, Math math) {
  const int fold = weight.group == 0 ? kNoGroups : weight.group == kBlock / 2 ? kHalfUnits : kWholeUnits;
  if (math == Math::kBytes) {
    Method method{{}, {}, nullptr, Bytes::kUnit};
    set_byte_tiles(method.direct, std::make_integer_sequence<int, kNumTileSizes>());
    set_byte_tiles(method.from_panel, std::make_integer_sequence<int, kNumTileSizes>());
    return method;
  }
#if defined(__AVX512BF16__)
  if (math == Math::kPairs) switch (weight.format) {
    case Format::kI8: return weight.zero ? pair_method<BytesToPairs<I8, true>>(fold) : pair_method<BytesToPairs<I8>>(fold);
    case Format::kE4M3: return pair_method<BytesToPairs<E4M3>>(fold);
    case Format::kE5M2: return pair_method<BytesToPairs<E5M2>>(fold);
    case Format::kI4: return pair_method<Nibbles<4>>(fold);
    case Format::kQ5: return pair_method<Nibbles<5>>(fold);
    case Format::kQ6: return pair_method<Nibbles<6>>(fold);
    case Format::kQ2: return pair_method<Pairs<2>>(fold);
    case Format::kQ3: return pair_method<Pairs<3>>(fold);
    case Format::kE2M1: return pair_method<E2M1>(fold);
    default: return pair_method<DenseBF16>(fold);
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (math == Math::kWords) switch (weight.format) {
    case Format::kI8: return word_method<I8>(fold);
    case Format::kI4: return word_method<Nibbles<4>>(fold);
    case Format::kQ5: return word_method<Nibbles<5>>(fold);
    case Format::kQ2: return word_method<Pairs<2>>(fold);
    case Format::kQ3: return word_method<Pairs<3>>(fold);
    default: return word_method<Nibbles<6>>(fold);
  }
#endif
  switch (weight.format) {
    case Format::kF32: return float_method<DenseF32>(fold);
    case Format::kF16: return float_method<DenseF16>(fold);
    case Format::kBF16: return float_method<DenseBF16>(fold);
    case Format::kI8: return float_method<I8>(fold);
    case Format::kE4M3: return float_method<E4M3>(fold);
    case Format::kE5M2: return float_method<E5M2>(fold);
    case Format::kI4: return float_method<Nibbles<4>>(fold);
    case Format::kQ5: return float_method<Nibbles<5>>(fold);
    case Format::kQ2: return float_method<Pairs<2>>(fold);
    case Format::kQ3: return float_method<Pairs<3>>(fold);
    case Format::kE2M1: return float_method<E2M1>(fold);
    default: return float_method<Nibbles<6>>(fold);
  }
}

// One weight and all rows: what each thread calls for its blocks.
struct Product {
  const Weight* weight;
  const Tiles* tiles;
  Method method;
  Tables tables;

  Product(const Weight& w, const Tiles& t) : weight(&w), tiles(&t), method(choose_method(w, t.math)), tables(make_tables(w)) {}

  // acc [num_rows padded to tiles][32] floats (or int32): the sums of one block.
  void compute(int64_t block, float* acc) const {
    const int64_t num_units = weight->num_units(), num_tiles = tiles->num_tiles();
    std::memset(acc, 0, num_tiles * kMaxTile * kBlock * sizeof(float));
    const Scaler scaler(*weight, block);
    const uint8_t* codes = weight->block_codes(block);
    const int64_t unit_size = unit_bytes(weight->format);
    if (num_tiles == 1) {
      run(method.direct, codes, 0, num_units, 0, scaler, acc);
      return;
    }
    // Units are decoded once for all tiles, as many as stay in the first cache beside a tile's activations; groups are not cut.
    const int64_t most = tiles->math == Math::kFloats ? 4 : 8;
    const int64_t units_a_group = std::max<int64_t>(1, weight->group / kBlock), step = std::max(most / units_a_group, int64_t{1}) * units_a_group;
    uint8_t* panel = method.fill_panel ? scratch().get<uint8_t>(Slot::kPanel, step * method.panel_unit_bytes) : nullptr;
    for (int64_t unit = 0; unit < num_units; unit += step) {
      const int64_t count = std::min(step, num_units - unit);
      const uint8_t* from = codes + unit * unit_size;
      if (panel) method.fill_panel(from, count, tables, panel);
      const int64_t num_bytes = panel ? count * unit_size : 0;  // to fetch a little beside each tile; at last of the next block
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t begin = num_bytes * tile / num_tiles / 64 * 64;
        prefetch(from + num_bytes + begin, num_bytes * (tile + 1) / num_tiles - begin);
        const bool reads_codes = !panel && tile == 0;  // and fetches
        run(reads_codes ? method.direct : method.from_panel, panel ? panel : from, unit, count, tile, scaler, acc + tile * kMaxTile * kBlock);
      }
    }
  }

  // One row's 32 sums as results: scaled where the scale is an output's, with the bias.
  void finish(int64_t block, int64_t row, const float* acc, vf (&out)[V]) const {
    for (int v = 0; v < V; ++v) {
      vf y = load<vf>(acc + v * W);
      if (tiles->math == Math::kBytes)
        y = __builtin_convertvector(load<vi>(acc + v * W) - 128 * tiles->row_sums[row], vf) * splat(tiles->row_scales[row]);
      const int64_t first = block * kBlock + v * W;
      if (weight->group == 0 && weight->scales) y = y * load_as_f32(item_at(weight->scales, weight->scale_dtype, first), weight->scale_dtype);
      if (weight->bias) {
        float bias[W] = {};
        const int64_t count = std::min<int64_t>(W, weight->n - first);
        if (count > 0) widen_row(item_at(weight->bias, weight->bias_dtype, first), weight->bias_dtype, count, bias);
        y = y + load<vf>(bias);
      }
      out[v] = y;
    }
  }

 private:
  void run(const TileFunction* functions, const uint8_t* codes, int64_t first_unit, int64_t count, int64_t tile, const Scaler& scaler,
           float* acc) const {
    const int index = tile_index(tiles->rows_of(tile));
    const int64_t stride = kTileSizes[index];
    const bool has_words = tiles->math == Math::kWords;
    const TileArgs args{codes, tiles->tile(tile) + first_unit * tiles->dwords_a_unit() * stride, tiles->tile_sums(tile) + first_unit * stride,
                        acc, first_unit, count, &scaler, &tables, has_words ? tiles->tile_scales(tile) + first_unit * stride : nullptr,
                        has_words ? tiles->tile_half_sums(tile) + first_unit * 2 * stride : nullptr, weight->format == Format::kI8 ? 0 : weight->zero};
    functions[index](args);
  }
};

static TPLLM_INLINE void store_block(const Rows& out, int64_t row, int64_t block, const vf (&values)[V]) {
  const int64_t first = block * kBlock;
  const int64_t at = row * out.num_columns + first;
  if (first + kBlock <= out.num_columns) {
    for (int v = 0; v < V; ++v) store_as(item_at(out.data, out.dtype, at + v * W), out.dtype, values[v]);
    return;
  }
  float wide[kBlock];
  for (int v = 0; v < V; ++v) store(wide + v * W, values[v]);
  narrow_row(wide, out.num_columns - first, out.dtype, item_at(out.data, out.dtype, at));
}
