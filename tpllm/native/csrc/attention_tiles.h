// Attention's inner loops: scores of some queries for one block of positions, and the sum of its values that their probabilities weigh.
//
// A score is one chain of sums over the head's dims in order, an output one over positions in order, for any number of queries.

constexpr int kPositions = 64;  // of a block
constexpr int kRuns = kPositions / W;

// W positions of a KV head, one after the other in memory.
struct Run {
  const uint8_t *at, *ahead;  // ahead: what is read after this, to be fetched early
  const float* scales;        // of caches that have them
};
using Runs = Run[kRuns];

// W rows turned over; the new rows are `to_stride` floats apart.
static TPLLM_INLINE void transpose(const vf (&rows)[W], float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  TPLLM_UNROLL for (int i = 0; i < 16; ++i) r[i] = (__m512)rows[i];
  TPLLM_UNROLL for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  TPLLM_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  // r[4 a + j] holds, in its 128-bit lane b, rows 4a..4a+3 of column 4b + j
  TPLLM_UNROLL for (int j = 0; j < 4; ++j) {
    const __m512 low02 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), low13 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    const __m512 high02 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88), high13 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(low02, high02, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(low02, high02, 0xDD));
    _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(low13, high13, 0x88));
    _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(low13, high13, 0xDD));
  }
#elif defined(__AVX2__)
  __m256 r[8], t[8];
  TPLLM_UNROLL for (int i = 0; i < 8; ++i) r[i] = (__m256)rows[i];
  TPLLM_UNROLL for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  TPLLM_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(t[i]), _mm256_castps_pd(t[i + 2])));
    r[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(t[i]), _mm256_castps_pd(t[i + 2])));
    r[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(t[i + 1]), _mm256_castps_pd(t[i + 3])));
    r[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(t[i + 1]), _mm256_castps_pd(t[i + 3])));
  }
  TPLLM_UNROLL for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * to_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * to_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
#else
  for (int j = 0; j < W; ++j)
    for (int i = 0; i < W; ++i) to[j * to_stride + i] = rows[i][j];
#endif
}

template <Dtype D>
static TPLLM_INLINE vf read_vector(const Run& run, int64_t position, int64_t item) {
  const vf x = load_as_f32(item_at(static_cast<const void*>(run.at), D, item), D);
  return has_scales(D) ? x * splat(run.scales[position]) : x;
}

// Keys with positions innermost: [H][64] floats, or of bfloat16 [H / 2][64] pairs as they are, which takes half the work. H: a multiple of 32.
template <Dtype D>
static void turn_keys(const Runs& runs, int64_t H, float* keys) {
  constexpr int kDims = D == Dtype::kBF16 ? 2 : 1;  // in a lane
  for (int r = 0; r < kRuns; ++r)
    for (int64_t h = 0; h < H; h += W * kDims) {
      prefetch(runs[r].ahead + h * W * item_bytes(D), W * W * kDims * item_bytes(D));
      vf rows[W];
      TPLLM_UNROLL for (int i = 0; i < W; ++i)
        rows[i] = D == Dtype::kBF16 ? load<vf>(runs[r].at + (i * H + h) * 2) : read_vector<D>(runs[r], i, i * H + h);
      transpose(rows, keys + h / kDims * kPositions + r * W, kPositions);
    }
}

// Values as [H / 32][64][32] floats, to be used for many tiles of queries.
template <Dtype D>
static void widen_values(const Runs& runs, int64_t H, float* values) {
  for (int64_t s = 0; s < kPositions; ++s) {
    const Run& run = runs[s / W];
    prefetch(run.ahead + s % W * H * item_bytes(D), H * item_bytes(D));
    for (int64_t h = 0; h < H; h += W) store(values + (h / kBlock * kPositions + s) * kBlock + h % kBlock, read_vector<D>(run, s % W, s % W * H + h));
  }
}

// How many vectors of each of M rows are summed at once: enough chains for the adders, as many as there are registers for.
constexpr int vectors_at_once(int M) { return M * 2 * V <= (W == 16 ? 16 : 8) ? 2 * V : V; }

// scores [M][64] = queries [H][M] times the turned keys
template <int M, bool IS_PAIRS>
static void score_tile(const float* keys, int64_t H, const float* queries, float* scores) {
  constexpr int N = vectors_at_once(M);
  for (int first = 0; first < kPositions; first += N * W) {
    vf acc[M][N] = {};
    for (int64_t h = 0; h < H; h += 1 + IS_PAIRS) {
      vu both[N];
      TPLLM_UNROLL for (int n = 0; n < N; ++n) both[n] = load<vu>(keys + h / (1 + IS_PAIRS) * kPositions + first + n * W);
      TPLLM_UNROLL for (int i = 0; i < 1 + IS_PAIRS; ++i) {
        vf key[N];
        TPLLM_UNROLL for (int n = 0; n < N; ++n) key[n] = IS_PAIRS ? widen_half(both[n], i) : as_float(both[n]);
        TPLLM_UNROLL for (int m = 0; m < M; ++m) {
          const vf query = splat(queries[(h + i) * M + m]);
          TPLLM_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = fma(key[n], query, acc[m][n]);
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) store(scores + m * kPositions + first + n * W, acc[m][n]);
  }
}

// Adds to N vectors of each of M rows of `out`, `stride` floats apart, 64 probabilities times what `value(position, n)` gives.
template <int M, int N, class VALUE>
static TPLLM_INLINE void weigh(const float* probabilities, float* out, int64_t stride, VALUE value) {
  vf acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = load<vf>(out + m * stride + n * W);
  for (int s = 0; s < kPositions; ++s) {
    vf x[N];
    TPLLM_UNROLL for (int n = 0; n < N; ++n) x[n] = value(s, n);
    TPLLM_UNROLL for (int m = 0; m < M; ++m) {
      const vf probability = splat(probabilities[m * kPositions + s]);
      TPLLM_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = fma(x[n], probability, acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(out + m * stride + n * W, acc[m][n]);
}

// out [M][H] += probabilities [M][64] times the values that widen_values wrote
template <int M>
static void weigh_widened(const float* values, int64_t H, const float* probabilities, float* out) {
  for (int64_t h = 0; h < H; h += kBlock)
    weigh<M, V>(probabilities, out + h, H, [&](int s, int n) TPLLM_INLINE_LAMBDA { return load<vf>(values + h * kPositions + s * kBlock + n * W); });
}

// The same straight from the cache, where there is one tile of queries.
template <Dtype D, int M>
static void weigh_tile(const Runs& runs, int64_t H, const float* probabilities, float* out) {
  constexpr int N = vectors_at_once(M);
  int64_t h = 0;
  const auto value = [&](int s, int n) TPLLM_INLINE_LAMBDA {
    const Run& run = runs[s / W];
    const int64_t item = s % W * H + h + n * W;
    if (n * W % kBlock == 0) prefetch(run.ahead + item * item_bytes(D), kBlock * item_bytes(D));
    return read_vector<D>(run, s % W, item);
  };
  for (; h + N * W <= H; h += N * W) weigh<M, N>(probabilities, out + h, H, value);
  for (; h < H; h += kBlock) weigh<M, V>(probabilities, out + h, H, value);
}

// What attends to a cache of one dtype, for each size of a tile.
struct AttentionFunctions {
  void (*turn_keys)(const Runs&, int64_t, float*);
  void (*widen_values)(const Runs&, int64_t, float*);
  void (*score[kNumTileSizes])(const float*, int64_t, const float*, float*);
  void (*weigh[kNumTileSizes])(const Runs&, int64_t, const float*, float*);
  void (*weigh_widened[kNumTileSizes])(const float*, int64_t, const float*, float*);
};
template <Dtype D, int... I>
static const AttentionFunctions* attention_functions(std::integer_sequence<int, I...>) {
  static constexpr AttentionFunctions all{turn_keys<D>, widen_values<D>, {score_tile<kTileSizes[I], D == Dtype::kBF16>...},
                                          {weigh_tile<D, kTileSizes[I]>...}, {weigh_widened<kTileSizes[I]>...}};
  return &all;
}
static const AttentionFunctions* attention_functions(Dtype dtype) {
  constexpr std::make_integer_sequence<int, kNumTileSizes> sizes;
  switch (dtype) {
    case Dtype::kF32: return attention_functions<Dtype::kF32>(sizes);
    case Dtype::kF16: return attention_functions<Dtype::kF16>(sizes);
    case Dtype::kBF16: return attention_functions<Dtype::kBF16>(sizes);
    case Dtype::kE4M3: return attention_functions<Dtype::kE4M3>(sizes);
    default: return attention_functions<Dtype::kI8>(sizes);
  }
}
