// The products a decoder layer makes, shared by a team: linear layers of one input, the gated MLP, rows of an embedding.

// The tiles that some weights want of one input, by the math they use; filled in a phase of its own where there are many rows.
struct Inputs {
  Rows x;
  Tiles tiles[kNumMaths];
  bool is_used[kNumMaths] = {}, needs_sums = false;

  Inputs(const Rows& rows, int64_t num_units, int layer = 0) : x(rows) {
    for (int i = 0; i < kNumMaths; ++i)
      tiles[i] = Tiles{static_cast<Math>(i), rows.num_rows, num_units, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    layer_ = layer;
  }
  const Tiles& want(const Weight& weight) {
    const int index = static_cast<int>(choose_math(weight, x.dtype));
    if (!is_used[index]) tiles[index] = make_tiles(static_cast<Math>(index), x.num_rows, weight.num_units(), layer_);
    is_used[index] = true;
    needs_sums |= weight.mins != nullptr;
    return tiles[index];
  }
  int64_t num_tiles() const { return (x.num_rows + kMaxTile - 1) / kMaxTile; }
  void fill(int64_t tile) const {
    for (int i = 0; i < kNumMaths; ++i)
      if (is_used[i]) fill_tile(tiles[i], x, tile, needs_sums);
  }

 private:
  int layer_;
};

// Blocks go to threads in chunks of about this many bytes of codes, so that taking one costs little beside reading it.
constexpr int64_t kChunkBytes = 64 * 1024;

static int64_t blocks_a_chunk(const Weight& weight, int64_t num_blocks, int64_t num_threads) {
  const int64_t block_bytes = weight.num_units() * unit_bytes(weight.format);
  const int64_t by_size = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, block_bytes));
  const int64_t by_share = std::max<int64_t>(1, num_blocks / (4 * num_threads));
  return std::min(by_size, by_share);
}

static float* accumulators(int64_t num_rows, int count) {
  const int64_t padded = (num_rows + kMaxTile - 1) / kMaxTile * kMaxTile;
  return scratch().get<float>(Slot::kAccumulators, count * padded * kBlock);
}

static void compute_linear_block(const Product& product, int64_t block, const Rows& out) {
  float* acc = accumulators(out.num_rows, 1);
  product.compute(block, acc);
  for (int64_t row = 0; row < out.num_rows; ++row) {
    vf values[V];
    product.finish(block, row, acc + row * kBlock, values);
    store_block(out, row, block, values);
  }
}

// A phase over the blocks of several products.
static std::pair<int64_t, Team::Work> product_phase(std::vector<Product> products, std::vector<Rows> outs, int64_t num_threads) {
  std::vector<int64_t> first_chunk{0}, chunk_blocks;
  int64_t total = 0;
  for (const Product& product : products) total += product.weight->num_blocks();
  for (const Product& product : products) {
    chunk_blocks.push_back(blocks_a_chunk(*product.weight, total, num_threads));
    first_chunk.push_back(first_chunk.back() + (product.weight->num_blocks() + chunk_blocks.back() - 1) / chunk_blocks.back());
  }
  const int64_t num_chunks = first_chunk.back();
  return {num_chunks, [=, products = std::move(products), outs = std::move(outs)](int64_t chunk) {
    size_t index = 0;
    while (chunk >= first_chunk[index + 1]) ++index;
    const int64_t begin = (chunk - first_chunk[index]) * chunk_blocks[index];
    const int64_t end = std::min(begin + chunk_blocks[index], products[index].weight->num_blocks());
    for (int64_t block = begin; block < end; ++block) compute_linear_block(products[index], block, outs[index]);
  }};
}

// A few rows are laid out at once by the calling thread; many in a phase.
static void add_input_phase(std::vector<std::pair<int64_t, Team::Work>>& phases, const Inputs& inputs) {
  if (inputs.num_tiles() == 1) inputs.fill(0);
  else phases.emplace_back(inputs.num_tiles(), [&inputs](int64_t tile) { inputs.fill(tile); });
}

static void linear(Team& team, const Rows& x, const Weight* weights, const Rows* outs, int64_t num_weights) {
  if (x.num_rows == 0 || num_weights == 0) return;
  FlushDenormals flush;
  Inputs inputs(x, weights[0].num_units());
  for (int64_t i = 0; i < num_weights; ++i) inputs.want(weights[i]);
  std::vector<Product> products;
  for (int64_t i = 0; i < num_weights; ++i) products.emplace_back(weights[i], inputs.want(weights[i]));
  std::vector<std::pair<int64_t, Team::Work>> phases;
  add_input_phase(phases, inputs);
  phases.push_back(product_phase(std::move(products), {outs, outs + num_weights}, team.size()));
  team.run(std::move(phases));
}

// What gate(x) and up(x) become, for one block of the inner dim.
static void compute_gated_block(const Product& gate, const Product& up, int64_t block, const Gating& gating, const Rows& inner) {
  float* gate_acc = accumulators(inner.num_rows, 2);
  float* up_acc = gate_acc + (inner.num_rows + kMaxTile - 1) / kMaxTile * kMaxTile * kBlock;
  gate.compute(block, gate_acc);
  up.compute(block, up_acc);
  for (int64_t row = 0; row < inner.num_rows; ++row) {
    vf g[V], u[V];
    gate.finish(block, row, gate_acc + row * kBlock, g);
    up.finish(block, row, up_acc + row * kBlock, u);
    for (int v = 0; v < V; ++v) u[v] = gated(g[v], u[v], gating);
    store_block(inner, row, block, u);
  }
}

static void gated_mlp(Team& team, const Rows& x, const Weight& gate, const Weight& up, const Weight& down, const Gating& gating, const Rows& out) {
  if (x.num_rows == 0) return;
  FlushDenormals flush;
  Inputs outer(x, gate.num_units());
  outer.want(gate), outer.want(up);
  const Product gate_product(gate, outer.want(gate)), up_product(up, outer.want(up));
  const Rows inner_rows{scratch().get(Slot::kInner, x.num_rows * gate.n * 4), x.dtype, x.num_rows, gate.n};
  Inputs inner(inner_rows, down.num_units(), 1);
  inner.want(down);
  const int64_t num_blocks = gate.num_blocks(), step = blocks_a_chunk(gate, num_blocks, team.size());
  std::vector<std::pair<int64_t, Team::Work>> phases;
  add_input_phase(phases, outer);
  phases.emplace_back((num_blocks + step - 1) / step, [&](int64_t chunk) {
    for (int64_t block = chunk * step; block < std::min((chunk + 1) * step, num_blocks); ++block)
      compute_gated_block(gate_product, up_product, block, gating, inner_rows);
  });
  phases.emplace_back(inner.num_tiles(), [&](int64_t tile) { inner.fill(tile); });
  phases.push_back(product_phase({Product(down, inner.want(down))}, {out}, team.size()));
  team.run(std::move(phases));
}

template <class F>
static void lookup_row(const Weight& table, int64_t token, float* out) {
  const Tables tables = make_tables(table);
  const int64_t block = token / kBlock, lane = token % kBlock;
  const int v = lane / W;
  const Scaler scaler(table, block);
  for (int64_t k = 0; k < table.padded_k; k += 8) {
    const auto raw = F::load(table.block_codes(block) + k / kBlock * F::kUnit, k % kBlock / 8, v);
    const float scale = table.group ? scaler.scale(k / table.group, v)[lane % W] : 1.0f;
    const float min = table.group && table.mins ? scaler.min(k / table.group, v)[lane % W] : 0.0f;
    for (int i = 0; i < 8; ++i) out[k + i] = scale * F::f32(raw, i, tables)[lane % W] + min;
  }
  if (table.group || !table.scales) return;
  const int64_t first = token / W * W;
  const float scale = load_as_f32(item_at(table.scales, table.scale_dtype, first), table.scale_dtype)[token % W];
  for (int64_t k = 0; k < table.padded_k; ++k) out[k] *= scale;
}

// Rows of a table, one for each token; tokens outside of it give zeros, so that shards of one can be added.
static void lookup(Team& team, const int32_t* tokens, const Weight& table, const Rows& out) {
  auto read = lookup_row<DenseF32>;
  switch (table.format) {
    case Format::kF32: break;
    case Format::kF16: read = lookup_row<DenseF16>; break;
    case Format::kBF16: read = lookup_row<DenseBF16>; break;
    case Format::kI8: read = lookup_row<I8>; break;
    case Format::kE4M3: read = lookup_row<E4M3>; break;
    case Format::kE5M2: read = lookup_row<E5M2>; break;
    case Format::kI4: read = lookup_row<Nibbles<4>>; break;
    case Format::kQ5: read = lookup_row<Nibbles<5>>; break;
    case Format::kQ6: read = lookup_row<Nibbles<6>>; break;
    case Format::kQ2: read = lookup_row<Pairs<2>>; break;
    case Format::kQ3: read = lookup_row<Pairs<3>>; break;
    case Format::kE2M1: read = lookup_row<E2M1>; break;
  }
  std::vector<std::pair<int64_t, Team::Work>> phases;
  phases.emplace_back((out.num_rows + 3) / 4, [&](int64_t chunk) {
    for (int64_t row = chunk * 4; row < std::min((chunk + 1) * 4, out.num_rows); ++row) {
      float* wide = scratch().get<float>(Slot::kPanel, table.padded_k);
      if (tokens[row] >= 0 && tokens[row] < table.n) read(table, tokens[row], wide);
      else std::memset(wide, 0, table.padded_k * 4);
      narrow_row(wide, out.num_columns, out.dtype, item_at(out.data, out.dtype, row * out.num_columns));
    }
  });
  team.run(std::move(phases));
}
