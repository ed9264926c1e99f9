// Causal attention of new tokens to a KV cache: rotate, append, attend.
//
// Keys and values are read in blocks of 64 positions with an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135), widened to floats a block at a time. Segments of 512 positions have a softmax of their own and are merged in order, so that
// threads can share a long row. Blocks lie at absolute positions, and a block that a query does not see leaves its state as it was: a query's
// result does not depend on what shares its call, nor on which pages of the cache its keys and values lie in.

constexpr int kPositions = 64;
constexpr int kSegment = 512;
constexpr float kMasked = -1e30f;

template <int M, int K_STRIDE, int M_STRIDE>
static TPLLM_INLINE void panel_product(const float* panel, int64_t count, const float* x, vf (&acc)[M][V]) {
  for (int64_t k = 0; k < count; ++k) {
    vf w[V];
    TPLLM_UNROLL for (int v = 0; v < V; ++v) w[v] = load<vf>(panel + k * kBlock + v * W);
    TPLLM_UNROLL for (int m = 0; m < M; ++m) {
      const vf xm = splat(x[k * K_STRIDE + m * M_STRIDE]);
      TPLLM_UNROLL for (int v = 0; v < V; ++v) acc[m][v] = fma(w[v], xm, acc[m][v]);
    }
  }
}

// scores [M][64] = queries [H][M] times keys [2][H][32]
template <int M>
static void score_tile(const float* keys, int64_t H, const float* queries, float* scores) {
  for (int half = 0; half < 2; ++half) {
    vf acc[M][V] = {};
    panel_product<M, M, 1>(keys + half * H * kBlock, H, queries, acc);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) store(scores + m * kPositions + half * kBlock + v * W, acc[m][v]);
  }
}
// out [M][padded_h] += probabilities [M][64] times values [padded_h / 32][64][32]
template <int M>
static void weigh_tile(const float* values, int64_t padded_h, const float* probabilities, float* out) {
  for (int64_t h = 0; h < padded_h; h += kBlock) {
    vf acc[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = load<vf>(out + m * padded_h + h + v * W);
    panel_product<M, 1, kPositions>(values + h * kPositions, kPositions, probabilities, acc);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) store(out + m * padded_h + h + v * W, acc[m][v]);
  }
}

struct TileFunctions {
  void (*score)(const float*, int64_t, const float*, float*);
  void (*weigh)(const float*, int64_t, const float*, float*);
};
template <int... I>
static TileFunctions attention_functions(int index, std::integer_sequence<int, I...>) {
  static constexpr TileFunctions all[] = {{score_tile<kTileSizes[I]>, weigh_tile<kTileSizes[I]>}...};
  return all[index];
}

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
#else
  for (int j = 0; j < W; ++j)
    for (int i = 0; i < W; ++i) to[j * to_stride + i] = rows[i][j];
#endif
}

// Some queries of one KV head, and how far the softmax of each has come.
struct Queries {
  int64_t batch, row, head, first_token, num_tokens;  // row: of the page table; head: of keys and values
  int64_t num_rows;                              // tokens x query heads of the KV head, token by token
  int64_t first_position, last_position;         // of the cache that any of them sees; last < first: nothing
};

struct State {  // of num_rows queries
  float *most, *sum, *out;  // [rows], [rows], [rows][padded_h]
};

class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : a(args), group(a.N / a.K), padded_h((a.H + kBlock - 1) / kBlock * kBlock), row_h((a.H + W - 1) / W * W), state_size(2 + padded_h),
        most_rows((std::max<int64_t>(8 * kMaxTile, group) + kMaxTile - 1) / kMaxTile * kMaxTile) {}

  void run(Team& team) {
    rotated = scratch().get<float>(Slot::kFloats, a.B * a.T * a.N * a.H);
    std::vector<std::pair<int64_t, Team::Work>> phases;
    const int64_t num_tokens = a.B * a.T, step = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, (a.N + 2 * a.K) * a.H));
    if (num_tokens <= step) {
      for (int64_t token = 0; token < num_tokens; ++token) append(token);
    } else {
      phases.emplace_back((num_tokens + step - 1) / step, [this, step, num_tokens](int64_t chunk) {
        for (int64_t token = chunk * step; token < std::min((chunk + 1) * step, num_tokens); ++token) append(token);
      });
    }
    const std::vector<Queries> tasks = make_tasks();
    int64_t num_segments = 0;
    std::vector<std::pair<int64_t, int64_t>> pieces;  // (task, segment)
    for (size_t i = 0; i < tasks.size(); ++i)
      for (int64_t s = tasks[i].first_position / kSegment; s <= tasks[i].last_position / kSegment && tasks[i].last_position >= 0; ++s, ++num_segments)
        pieces.emplace_back(i, s);
    const bool is_split = static_cast<int64_t>(tasks.size()) < 2 * team.size() && team.size() > 1 && pieces.size() > tasks.size();
    float* partials = nullptr;
    if (is_split) {
      partials = scratch().get<float>(Slot::kPartials, static_cast<int64_t>(pieces.size()) * most_rows * state_size);
      phases.emplace_back(pieces.size(), [this, &pieces, &tasks, partials](int64_t i) {
        const Queries& task = tasks[pieces[i].first];
        attend_segment(task, pieces[i].second, state_at(partials + i * most_rows * state_size));
      });
      phases.emplace_back(tasks.size(), [this, &pieces, &tasks, partials](int64_t i) {
        const State total = start_total(tasks[i]);
        for (size_t j = 0; j < pieces.size(); ++j)
          if (pieces[j].first == i) merge(tasks[i], state_at(partials + j * most_rows * state_size), total);
        finish(tasks[i], total);
      });
    } else {
      phases.emplace_back(tasks.size(), [this, &tasks](int64_t i) {
        const State total = start_total(tasks[i]);
        const State segment = state_at(scratch().get<float>(Slot::kPanel, most_rows * state_size));
        const Queries& task = tasks[i];
        for (int64_t s = task.first_position / kSegment; s <= task.last_position / kSegment && task.last_position >= 0; ++s) {
          attend_segment(task, s, segment);
          merge(task, segment, total);
        }
        finish(task, total);
      });
    }
    team.run(std::move(phases));
  }

 private:
  const AttentionArgs& a;
  const int64_t group, padded_h, row_h, state_size;
  const int64_t most_rows;  // of one task: new tokens times the query heads of a KV head
  float* rotated = nullptr;  // [B, T, N, H]

  State state_at(float* memory) const { return {memory, memory + most_rows, memory + 2 * most_rows}; }
  int64_t row_of(int64_t batch, int64_t t) const { return !a.rows ? batch : a.is_ragged ? a.rows[batch * a.T + t] : a.rows[batch]; }
  // Where a head's entry of a row's position lies in the cache, or -1 where the row has no page for it.
  int64_t entry_of(int64_t row, int64_t head, int64_t position) const {
    if (row < 0 || row >= a.num_rows || position < 0 || position >= a.L * a.S) return -1;
    const int64_t page = a.pages ? a.pages[row * a.L + position / a.S] : row;
    return page < 0 || page >= a.P ? -1 : (page * a.K + head) * a.S + position % a.S;
  }

  void rotate(const void* from, float* to, const float* cos, const float* sin) const {
    widen_row(from, a.dtype, a.H, to);
    const int64_t half = a.R / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float first = to[i], second = to[i + half];
      to[i] = first * cos[i] - second * sin[i];
      to[i + half] = second * cos[i + half] + first * sin[i + half];
    }
  }

  void write_entry(const float* x, void* cache, float* scales, int64_t entry) const {
    if (!has_scales(a.cache_dtype)) return narrow_row(x, a.H, a.cache_dtype, item_at(cache, a.cache_dtype, entry * a.H));
    float most = 0;
    for (int64_t i = 0; i < a.H; ++i) most = std::max(most, __builtin_fabsf(x[i]));
    const bool is_int8 = a.cache_dtype == Dtype::kI8;
    const float largest = is_int8 ? 127.0f : 448.0f, inverse = most > 0 ? largest / most : 0.0f;
    scales[entry] = most / largest;
    for (int64_t i = 0; i < a.H; ++i) {
      const float scaled = __builtin_fminf(__builtin_fmaxf(x[i] * inverse, -largest), largest);
      auto* to = static_cast<uint8_t*>(cache) + entry * a.H + i;
      *to = is_int8 ? static_cast<uint8_t>(static_cast<int32_t>(scaled + 12582912.0f - 12582912.0f)) : narrow_e4m3_one(scaled);
    }
  }

  // Rotates a token's queries and key, and writes key and value to the cache.
  void append(int64_t token) const {
    const float *cos = a.cos + token * a.R, *sin = a.sin + token * a.R;
    for (int64_t n = 0; n < a.N; ++n)
      rotate(item_at(a.q, a.dtype, (token * a.N + n) * a.H), rotated + (token * a.N + n) * a.H, cos, sin);
    const int64_t first = entry_of(row_of(token / a.T, token % a.T), 0, a.positions[token]);
    if (first < 0) return;
    float* wide = scratch().get<float>(Slot::kPanel, row_h);
    for (int64_t head = 0; head < a.K; ++head) {
      const int64_t entry = first + head * a.S;
      rotate(item_at(a.k, a.dtype, (token * a.K + head) * a.H), wide, cos, sin);
      write_entry(wide, a.k_cache, a.k_scales, entry);
      widen_row(item_at(a.v, a.dtype, (token * a.K + head) * a.H), a.dtype, a.H, wide);
      write_entry(wide, a.v_cache, a.v_scales, entry);
    }
  }

  std::vector<Queries> make_tasks() const {
    std::vector<Queries> tasks;
    const int64_t tokens_a_task = std::max<int64_t>(1, most_rows / group);
    for (int64_t batch = 0; batch < a.B; ++batch)
      for (int64_t first = 0, count; first < a.T; first += count) {
        const int64_t row = row_of(batch, first);
        for (count = 1; count < tokens_a_task && first + count < a.T && row_of(batch, first + count) == row;) ++count;
        for (int64_t head = 0; head < a.K; ++head) {
          Queries task{batch, row, head, first, count, count * group, a.L * a.S, -1};
          for (int64_t t = first; t < first + count; ++t) {
            const int64_t position = a.positions[batch * a.T + t];
            if (position < 0 || row < 0 || row >= a.num_rows) continue;
            task.last_position = std::max(task.last_position, std::min(position, a.L * a.S - 1));
            task.first_position = std::min(task.first_position, a.window ? std::max<int64_t>(0, position - a.window + 1) : 0);
          }
          tasks.push_back(task);
        }
      }
    return tasks;
  }

  // Where the W positions from each multiple of W on lie, of one block and of the next; -1 where there is no page.
  struct Places {
    int64_t here[kPositions / W], ahead[kPositions / W];
  };
  // read_block of a block that is full, of a cache whose heads are whole vectors: no detour through rows of floats.
  template <Dtype D>
  void read_full_block(const Places& at, float* keys, float* values) const {
    for (int64_t s = 0; s < kPositions; s += W) {
      const int64_t here = at.here[s / W], ahead = at.ahead[s / W];
      for (int64_t h = 0; h < a.H; h += W) {
        prefetch<D>(a.k_cache, ahead * a.H + h * W, W * W);
        vf rows[W];
        TPLLM_UNROLL for (int i = 0; i < W; ++i) rows[i] = read_vector<D>(a.k_cache, a.k_scales, here + i, h);
        transpose(rows, keys + (s / kBlock * a.H + h) * kBlock + s % kBlock, kBlock);
      }
    }
    for (int64_t s = 0; s < kPositions; ++s) {
      const int64_t here = at.here[s / W] + s % W, ahead = at.ahead[s / W] + s % W;
      prefetch<D>(a.v_cache, ahead * a.H, a.H);
      for (int64_t h = 0; h < a.H; h += W)
        store(values + (h / kBlock * kPositions + s) * kBlock + h % kBlock, read_vector<D>(a.v_cache, a.v_scales, here, h));
    }
  }
  // The same place of the next block: the processor's own prefetching stops at the end of a page of memory, and a block is two or more. A
  // little at a time, for only so many lines can be under way.
  template <Dtype D>
  TPLLM_INLINE void prefetch(const void* cache, int64_t item, int64_t count) const {
    const auto* at = static_cast<const uint8_t*>(item_at(cache, D, item));
    for (int64_t i = 0; i < count * item_bytes(D); i += 64) __builtin_prefetch(at + i, 0, 3);
  }
  template <Dtype D>
  TPLLM_INLINE vf read_vector(const void* cache, const float* scales, int64_t entry, int64_t h) const {
    const vf x = load_as_f32(item_at(cache, D, entry * a.H + h), D);
    return has_scales(D) ? x * splat(scales[entry]) : x;
  }

  // One block's keys, turned over to [2][H][32], and its values as [padded_h / 32][64][32]; positions from `valid` on are zeros.
  void read_block(const Queries& task, int64_t start, float* keys, float* values) const {
    const int64_t valid = std::min<int64_t>(kPositions, task.last_position + 1 - start);
    Places at;
    bool is_whole = valid == kPositions && a.H % kBlock == 0;
    for (int64_t i = 0; i < kPositions / W; ++i) {
      at.here[i] = entry_of(task.row, task.head, start + i * W);
      const int64_t ahead = entry_of(task.row, task.head, start + kPositions + i * W);
      at.ahead[i] = ahead < 0 ? at.here[i] : ahead;
      is_whole &= at.here[i] >= 0;
    }
    if (is_whole) {
      switch (a.cache_dtype) {
        case Dtype::kF32: return read_full_block<Dtype::kF32>(at, keys, values);
        case Dtype::kF16: return read_full_block<Dtype::kF16>(at, keys, values);
        case Dtype::kBF16: return read_full_block<Dtype::kBF16>(at, keys, values);
        case Dtype::kE4M3: return read_full_block<Dtype::kE4M3>(at, keys, values);
        default: return read_full_block<Dtype::kI8>(at, keys, values);
      }
    }
    float* wide = scratch().get<float>(Slot::kRowScales, W * row_h + W);  // + W: a row's end is written in whole vectors
    for (int64_t s = 0; s < kPositions; s += W) {
      for (int64_t i = 0; i < W; ++i) read_entry(a.k_cache, a.k_scales, at.here[s / W], i, s + i < valid, wide + i * row_h);
      for (int64_t h = 0; h < row_h; h += W) {
        float* to = keys + (s / kBlock * a.H + h) * kBlock + s % kBlock;
        if (h + W <= a.H) {
          vf rows[W];
          TPLLM_UNROLL for (int i = 0; i < W; ++i) rows[i] = load<vf>(wide + i * row_h + h);
          transpose(rows, to, kBlock);
        } else {
          for (int64_t j = 0; j < a.H - h; ++j)
            for (int64_t i = 0; i < W; ++i) to[j * kBlock + i] = wide[i * row_h + h + j];
        }
      }
    }
    for (int64_t s = 0; s < kPositions; ++s) {
      read_entry(a.v_cache, a.v_scales, at.here[s / W], s % W, s < valid, wide);
      for (int64_t h = 0; h < padded_h; h += W) store(values + (h / kBlock * kPositions + s) * kBlock + h % kBlock, h < row_h ? load<vf>(wide + h) : vf{});
    }
  }
  void read_entry(const void* cache, const float* scales, int64_t first, int64_t offset, bool is_valid, float* to) const {
    const int64_t entry = first + offset;
    is_valid &= first >= 0;
    if (row_h != a.H || !is_valid) std::memset(to, 0, row_h * 4);
    if (!is_valid) return;
    widen_row(item_at(cache, a.cache_dtype, entry * a.H), a.cache_dtype, a.H, to);
    if (has_scales(a.cache_dtype))
      for (int64_t h = 0; h < row_h; h += W) store(to + h, load<vf>(to + h) * splat(scales[entry]));
  }

  // One row's 64 scores to probabilities under its own new maximum; what it had is shrunk to it.
  void soften(float* scores, int64_t start, int64_t position, float& most, float& sum, float* out) const {
    const int64_t last = position - start, first = a.window ? last - a.window + 1 : -1;
    vf x[kPositions / W], largest = splat(kMasked);
    vi seen[kPositions / W];
    for (int i = 0; i < kPositions / W; ++i) {
      vi lane;
      TPLLM_UNROLL for (int j = 0; j < W; ++j) lane[j] = i * W + j;
      const int32_t low = first < -1 ? -1 : first > kPositions ? kPositions : first, high = last > kPositions ? kPositions : last < -1 ? -1 : last;
      seen[i] = (lane <= high) & (lane >= low);
      x[i] = load<vf>(scores + i * W) * splat(a.scale);
      if (a.softcap != 0) x[i] = splat(a.softcap) * tanh(x[i] * splat(1 / a.softcap));
      x[i] = select(seen[i], x[i], splat(kMasked));
      largest = vmax(largest, x[i]);
    }
    const float block_most = reduce_max(largest), new_most = most > block_most ? most : block_most;
    vf total = vf{};
    for (int i = 0; i < kPositions / W; ++i) {
      x[i] = select(seen[i], exp(x[i] - splat(new_most)), vf{});
      total += x[i];
      store(scores + i * W, x[i]);
    }
    const float shrink = exp(splat(most - new_most))[0];
    sum = sum * shrink + reduce_add(total);
    if (shrink != 1.0f)
      for (int64_t h = 0; h < padded_h; h += W) store(out + h, load<vf>(out + h) * splat(shrink));
    most = new_most;
  }

  void attend_segment(const Queries& task, int64_t segment, const State& state) const {
    const int64_t panel_floats = 2 * row_h * kBlock + padded_h * kPositions;
    float* keys = scratch().get<float>(Slot::kAttention, panel_floats + most_rows * a.H + kMaxTile * kPositions);
    float *values = keys + 2 * row_h * kBlock, *queries = keys + panel_floats, *scores = queries + most_rows * a.H;
    for (int64_t r = 0; r < most_rows; ++r) state.most[r] = kMasked, state.sum[r] = 0;
    std::memset(state.out, 0, (task.num_rows + kMaxTile - 1) / kMaxTile * kMaxTile * padded_h * 4);
    turn_queries(task, queries);
    const int64_t begin = std::max(segment * kSegment, task.first_position / kPositions * kPositions);
    const int64_t end = std::min((segment + 1) * kSegment, task.last_position + 1);
    for (int64_t start = begin; start < end; start += kPositions) {
      read_block(task, start, keys, values);
      for (int64_t row = 0; row < task.num_rows; row += kMaxTile) {
        const int64_t count = std::min<int64_t>(kMaxTile, task.num_rows - row);
        if (!sees_block(task, row, count, start)) continue;
        const TileFunctions functions = attention_functions(tile_index(count), std::make_integer_sequence<int, kNumTileSizes>());
        functions.score(keys, a.H, queries + row * a.H, scores);
        for (int64_t i = 0; i < count; ++i)
          soften(scores + i * kPositions, start, position_of(task, row + i), state.most[row + i], state.sum[row + i], state.out + (row + i) * padded_h);
        for (int64_t i = count; i < kTileSizes[tile_index(count)]; ++i) std::memset(scores + i * kPositions, 0, kPositions * 4);
        functions.weigh(values, padded_h, scores, state.out + row * padded_h);
      }
    }
  }
  int64_t position_of(const Queries& task, int64_t row) const { return a.positions[task.batch * a.T + task.first_token + row / group]; }
  bool sees_block(const Queries& task, int64_t row, int64_t count, int64_t start) const {
    for (int64_t i = row; i < row + count; ++i) {
      const int64_t position = position_of(task, i);
      if (position >= start && (!a.window || position - a.window + 1 < start + kPositions)) return true;
    }
    return false;
  }
  // Tiles of [H][M].
  void turn_queries(const Queries& task, float* queries) const {
    for (int64_t row = 0; row < task.num_rows; row += kMaxTile) {
      const int64_t count = std::min<int64_t>(kMaxTile, task.num_rows - row), stride = kTileSizes[tile_index(count)];
      for (int64_t i = 0; i < stride; ++i) {
        const int64_t token = task.batch * a.T + task.first_token + (row + i) / group;
        const float* from = rotated + (token * a.N + task.head * group + (row + i) % group) * a.H;
        for (int64_t h = 0; h < a.H; ++h) queries[row * a.H + h * stride + i] = i < count ? from[h] : 0.0f;
      }
    }
  }

  // Nothing yet, or only the sink, whose value is zero.
  State start_total(const Queries& task) const {
    const State total = state_at(scratch().get<float>(Slot::kInner, most_rows * state_size));
    for (int64_t r = 0; r < most_rows; ++r) {
      total.most[r] = a.sinks ? a.sinks[task.head * group + r % group] : kMasked;
      total.sum[r] = a.sinks ? 1.0f : 0.0f;
    }
    std::memset(total.out, 0, most_rows * padded_h * 4);
    return total;
  }
  void merge(const Queries& task, const State& part, const State& total) const {
    for (int64_t r = 0; r < task.num_rows; ++r) {
      if (part.sum[r] == 0) continue;
      const float most = std::max(total.most[r], part.most[r]);
      const vf shrink = exp(splat(total.most[r] - most)), part_shrink = exp(splat(part.most[r] - most));
      total.sum[r] = total.sum[r] * shrink[0] + part.sum[r] * part_shrink[0];
      total.most[r] = most;
      for (int64_t h = r * padded_h; h < (r + 1) * padded_h; h += W)
        store(total.out + h, fma(load<vf>(total.out + h), shrink, load<vf>(part.out + h) * part_shrink));
    }
  }
  void finish(const Queries& task, const State& total) const {
    for (int64_t r = 0; r < task.num_rows; ++r) {
      const vf scale = splat(total.sum[r] > 0 ? 1.0f / total.sum[r] : 0.0f);
      float* out = total.out + r * padded_h;
      for (int64_t h = 0; h < padded_h; h += W) store(out + h, load<vf>(out + h) * scale);
      const int64_t token = task.batch * a.T + task.first_token + r / group;
      narrow_row(out, a.H, a.dtype, item_at(a.out, a.dtype, (token * a.N + task.head * group + r % group) * a.H));
    }
  }
};

static void attention(Team& team, const AttentionArgs& args) {
  if (args.B == 0 || args.T == 0) return;
  FlushDenormals flush;
  Attention(args).run(team);
}
