// Sums of rows in one order, whatever their number: root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467) of x or of
// x + delta, and plain sums, which XLA would order by the shape of the whole array.

// y = x / sqrt(mean(x^2) + eps) * weight. Where there is a delta, x + delta takes x's place and is given too, rounded to its dtype.
static void rms_norm(Team& team, const Rows& x, const Rows* delta, const void* weight, Dtype weight_dtype, float eps, const Rows& out,
                     const Rows* sum) {
  const int64_t D = x.num_columns, padded = (D + W - 1) / W * W;
  const int64_t step = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, D));
  std::vector<std::pair<int64_t, Team::Work>> phases;
  phases.emplace_back((x.num_rows + step - 1) / step, [=](int64_t chunk) {
    float* wide = scratch().get<float>(Slot::kPanel, 3 * padded);
    float *other = wide + padded, *scales = other + padded;
    std::memset(wide, 0, 3 * padded * 4);
    widen_row(weight, weight_dtype, D, scales);
    for (int64_t row = chunk * step; row < std::min((chunk + 1) * step, x.num_rows); ++row) {
      widen_row(item_at(x.data, x.dtype, row * D), x.dtype, D, wide);
      if (delta) {
        widen_row(item_at(delta->data, x.dtype, row * D), x.dtype, D, other);
        for (int64_t i = 0; i < padded; i += W) store(wide + i, load<vf>(wide + i) + load<vf>(other + i));
        void* rounded = item_at(sum->data, x.dtype, row * D);
        narrow_row(wide, D, x.dtype, rounded);
        widen_row(rounded, x.dtype, D, wide);
      }
      vf squares = vf{};
      for (int64_t i = 0; i < padded; i += W) squares = fma(load<vf>(wide + i), load<vf>(wide + i), squares);
      const vf scale = splat(1.0f / __builtin_sqrtf(reduce_add(squares) / D + eps));
      for (int64_t i = 0; i < padded; i += W) store(other + i, load<vf>(wide + i) * scale * load<vf>(scales + i));
      narrow_row(other, D, out.dtype, item_at(out.data, out.dtype, row * D));
    }
  });
  team.run(std::move(phases));
}

static void row_sums(Team& team, const Rows& x, float* out) {
  const int64_t step = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, x.num_columns));
  std::vector<std::pair<int64_t, Team::Work>> phases;
  phases.emplace_back((x.num_rows + step - 1) / step, [=](int64_t chunk) {
    for (int64_t row = chunk * step; row < std::min((chunk + 1) * step, x.num_rows); ++row) {
      const float* from = static_cast<const float*>(x.data) + row * x.num_columns;
      vf sums[4] = {};
      int64_t i = 0;
      for (; i + 4 * W <= x.num_columns; i += 4 * W)
        TPLLM_UNROLL for (int j = 0; j < 4; ++j) sums[j] += load<vf>(from + i + j * W);
      float rest = 0;
      for (; i < x.num_columns; ++i) rest += from[i];
      out[row] = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    }
  });
  team.run(std::move(phases));
}
