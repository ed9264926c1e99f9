// Causal attention of new tokens to a KV cache: rotate, append, attend.
//
// Keys and values are read in blocks of 64 positions with an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135). Segments of 512 positions have a softmax of their own and are merged in order, so that threads can share a long row. Blocks lie
// at absolute positions, and a block that a query does not see leaves its state as it was: a query's result does not depend on what shares its call,
// nor on which pages of the cache its keys and values lie in.

constexpr int kSegment = 512;
constexpr float kMasked = -1e30f;

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
      : a(args), functions(*attention_functions(a.cache_dtype)), group(a.N / a.K), padded_h((a.H + kBlock - 1) / kBlock * kBlock),
        state_size(2 + padded_h), most_rows((std::max<int64_t>(8 * kMaxTile, group) + kMaxTile - 1) / kMaxTile * kMaxTile) {}

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
  const AttentionFunctions& functions;
  const int64_t group, padded_h, state_size;
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
    float* wide = scratch().get<float>(Slot::kPanel, a.H);
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

  // Where the keys and the values of one block are.
  struct Block {
    Runs keys, values;
  };
  Run run_of(const void* cache, const float* scales, int64_t entry, int64_t ahead) const {
    const auto at = [&](int64_t e) { return static_cast<const uint8_t*>(item_at(cache, a.cache_dtype, e * a.H)); };
    return {at(entry), at(ahead < 0 ? entry : ahead), scales ? scales + entry : nullptr};
  }
  // In the cache itself where the block is full and heads are whole; else in a copy with zeros for what is missing.
  Block find_block(const Queries& task, int64_t start, uint8_t* copy) const {
    const int64_t valid = std::min<int64_t>(kPositions, task.last_position + 1 - start);
    const bool is_last = start + kPositions > task.last_position;  // the next one read may be the next head's first
    Block block;
    bool is_whole = valid == kPositions && a.H == padded_h;
    for (int64_t i = 0; i < kRuns; ++i) {
      const int64_t entry = entry_of(task.row, task.head, start + i * W);
      const int64_t ahead = !is_last ? entry_of(task.row, task.head, start + kPositions + i * W) : task.head + 1 == a.K ? -1
          : entry_of(task.row, task.head + 1, task.first_position / kPositions * kPositions + i * W);
      if (entry < 0) { is_whole = false; break; }
      block.keys[i] = run_of(a.k_cache, a.k_scales, entry, ahead), block.values[i] = run_of(a.v_cache, a.v_scales, entry, ahead);
    }
    if (is_whole) return block;
    copy_block(task, start, valid, a.k_cache, a.k_scales, copy, block.keys);
    copy_block(task, start, valid, a.v_cache, a.v_scales, copy + copy_bytes(), block.values);
    return block;
  }
  int64_t copy_bytes() const { return kPositions * (padded_h * item_bytes(a.cache_dtype) + static_cast<int64_t>(sizeof(float))); }
  void copy_block(const Queries& task, int64_t start, int64_t valid, const void* cache, const float* scales, uint8_t* copy, Runs& runs) const {
    const int64_t row_bytes = padded_h * item_bytes(a.cache_dtype), head_bytes = a.H * item_bytes(a.cache_dtype);
    auto* copied_scales = reinterpret_cast<float*>(copy + kPositions * row_bytes);
    std::memset(copy, 0, copy_bytes());
    for (int64_t i = 0; i < kRuns; ++i) {
      runs[i] = {copy + i * W * row_bytes, copy + i * W * row_bytes, copied_scales + i * W};
      const int64_t first = entry_of(task.row, task.head, start + i * W);
      for (int64_t s = i * W; first >= 0 && s < std::min<int64_t>((i + 1) * W, valid); ++s) {
        std::memcpy(copy + s * row_bytes, item_at(cache, a.cache_dtype, (first + s % W) * a.H), head_bytes);
        if (scales) copied_scales[s] = scales[first + s % W];
      }
    }
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
    const int64_t panel_floats = padded_h * kPositions;
    float* keys = scratch().get<float>(Slot::kAttention, 2 * panel_floats + most_rows * padded_h + kMaxTile * kPositions);
    float *values = keys + panel_floats, *queries = values + panel_floats, *scores = queries + most_rows * padded_h;
    auto* copy = scratch().get<uint8_t>(Slot::kRowScales, 2 * copy_bytes());
    const bool is_one_tile = task.num_rows <= kMaxTile;
    start_state(task, state, false);
    turn_queries(task, queries);
    const int64_t begin = std::max(segment * kSegment, task.first_position / kPositions * kPositions);
    const int64_t end = std::min((segment + 1) * kSegment, task.last_position + 1);
    for (int64_t start = begin; start < end; start += kPositions) {
      const Block block = find_block(task, start, copy);
      functions.turn_keys(block.keys, padded_h, keys);
      if (!is_one_tile) functions.widen_values(block.values, padded_h, values);
      for (int64_t row = 0; row < task.num_rows; row += kMaxTile) {
        const int64_t count = std::min<int64_t>(kMaxTile, task.num_rows - row);
        if (!sees_block(task, row, count, start)) continue;
        const int tile = tile_index(count);
        functions.score[tile](keys, padded_h, queries + row * padded_h, scores);
        for (int64_t i = 0; i < count; ++i)
          soften(scores + i * kPositions, start, position_of(task, row + i), state.most[row + i], state.sum[row + i], state.out + (row + i) * padded_h);
        for (int64_t i = count; i < kTileSizes[tile]; ++i) std::memset(scores + i * kPositions, 0, kPositions * 4);
        if (is_one_tile) functions.weigh[tile](block.values, padded_h, scores, state.out);
        else functions.weigh_widened[tile](values, padded_h, scores, state.out + row * padded_h);
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
        for (int64_t h = 0; h < padded_h; ++h) queries[row * padded_h + h * stride + i] = i < count && h < a.H ? from[h] : 0.0f;
      }
    }
  }

  // Nothing yet, or only the sink, whose value is zero.
  void start_state(const Queries& task, const State& state, bool has_sinks) const {
    for (int64_t r = 0; r < task.num_rows; ++r) {
      state.most[r] = has_sinks ? a.sinks[task.head * group + r % group] : kMasked;
      state.sum[r] = has_sinks ? 1.0f : 0.0f;
    }
    std::memset(state.out, 0, (task.num_rows + kMaxTile - 1) / kMaxTile * kMaxTile * padded_h * 4);
  }
  State start_total(const Queries& task) const {
    const State total = state_at(scratch().get<float>(Slot::kInner, most_rows * state_size));
    start_state(task, total, a.sinks != nullptr);
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
