// Activations laid out for the inner loops: tiles of a few rows, inputs outermost, so that one input of all rows of a tile lies together.

#if defined(__AVX512F__)
constexpr int kTileSizes[] = {1, 2, 4, 8, 12};
#else
constexpr int kTileSizes[] = {1, 2, 3};
#endif
constexpr int kNumTileSizes = sizeof(kTileSizes) / sizeof(kTileSizes[0]);
constexpr int kMaxTile = kTileSizes[kNumTileSizes - 1];

enum class Math { kFloats, kPairs, kBytes, kWords };  // float32, pairs of bfloat16, int8, pairs of int16
constexpr int kNumMaths = 4;

static TPLLM_INLINE int tile_index(int64_t rows) {  // the smallest tile that holds them; what is missing are rows of zeros
  int index = 0;
  while (kTileSizes[index] < rows && index < kNumTileSizes - 1) ++index;
  return index;
}

// A dword of a tile is a float, two bfloat16, four int8 or two int16. The int16 of a row's unit are its inputs over a power of two of their own:
// exact where an input has 8 bits, as bfloat16 has, and is at least 1/128 of the unit's largest.
struct Tiles {
  Math math;
  int64_t num_rows, num_units;
  uint32_t* data;      // tile after tile: [padded_k / per_dword][rows of the tile]
  float* sums;         // tile after tile: [units][rows of the tile]; the sum of each unit's inputs, which mins multiply
  float* row_scales;   // [num_rows] of int8 rows
  int32_t* row_sums;   // [num_rows] of int8 rows
  float* unit_scales;  // of int16, tile after tile: [units][rows of the tile]
  int32_t* half_sums;  // of int16, tile after tile: [units][2][rows of the tile]

  int64_t num_tiles() const { return (num_rows + kMaxTile - 1) / kMaxTile; }
  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kMaxTile, num_rows - tile * kMaxTile); }
  int dwords_a_unit() const { return math == Math::kFloats ? 32 : math == Math::kBytes ? 8 : 16; }
  uint32_t* tile(int64_t index) const { return data + index * kMaxTile * num_units * dwords_a_unit(); }
  float* tile_sums(int64_t index) const { return sums + index * kMaxTile * num_units; }
  float* tile_scales(int64_t index) const { return unit_scales + index * kMaxTile * num_units; }
  int32_t* tile_half_sums(int64_t index) const { return half_sums + index * kMaxTile * num_units * 2; }
};

static Tiles make_tiles(Math math, int64_t num_rows, int64_t num_units, int layer = 0) {
  Tiles tiles{math, num_rows, num_units, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int64_t padded_rows = tiles.num_tiles() * kMaxTile;
  const Slot slot = math == Math::kFloats ? Slot::kFloats : math == Math::kBytes ? Slot::kBytes : Slot::kPairs;
  tiles.data = scratch().get<uint32_t>(slot, padded_rows * num_units * tiles.dwords_a_unit(), layer);
  tiles.sums = scratch().get<float>(Slot::kSums, 2 * padded_rows * num_units, layer) + (math == Math::kFloats ? padded_rows * num_units : 0);
  if (math == Math::kBytes) {
    tiles.row_scales = scratch().get<float>(Slot::kRowScales, 2 * padded_rows, layer);
    tiles.row_sums = reinterpret_cast<int32_t*>(tiles.row_scales + padded_rows);
  }
  if (math == Math::kWords) {
    tiles.unit_scales = scratch().get<float>(Slot::kUnitScales, 3 * padded_rows * num_units, layer);
    tiles.half_sums = reinterpret_cast<int32_t*>(tiles.unit_scales + padded_rows * num_units);
  }
  return tiles;
}

static void fill_tile_row(const Tiles& tiles, const float* x_K, int64_t row, int64_t lane, int64_t stride, uint32_t* out) {
  const int64_t padded_k = tiles.num_units * kBlock;
  if (tiles.math == Math::kFloats) {
    for (int64_t k = 0; k < padded_k; ++k) __builtin_memcpy(out + k * stride + lane, x_K + k, 4);
    return;
  }
  // int8, one scale a row: 127 is the largest magnitude. Ties go to even, as jnp.round has it.
  vf largest = vf{};
  for (int64_t k = 0; k < padded_k; k += W) {
    const vf x = load<vf>(x_K + k);
    largest = vmax(vmax(x, -x), largest);
  }
  const float most = reduce_max(largest), inverse = most > 0 ? 127.0f / most : 0.0f;
  tiles.row_scales[row] = most / 127.0f;
  int32_t sum = 0;
  for (int64_t k = 0; k < padded_k; k += 4) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
      const float scaled = __builtin_fminf(__builtin_fmaxf(x_K[k + i] * inverse, -127.0f), 127.0f);
      const int32_t code = static_cast<int32_t>(scaled + 12582912.0f - 12582912.0f);
      sum += code;
      bytes |= (code & 0xFFu) << (8 * kByteOf[i]);
    }
    out[k / 4 * stride + lane] = bytes;
  }
  tiles.row_sums[row] = sum;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// One unit of a row as int16, to every stride-th dword; halves' sums are `stride` apart. Inputs that are not finite make the scale a NaN.
static void fill_words(const float* x, int64_t stride, uint32_t* out, float* scale, int32_t* half_sums) {
  vf largest = vf{}, poison = vf{};
  for (int i = 0; i < kBlock; i += W) {
    const vf v = load<vf>(x + i);
    largest = vmax(vmax(v, -v), largest), poison += v - v;
  }
  int32_t words[kBlock] = {}, sum[2] = {};
  const float most = reduce_max(largest);
  uint32_t bits;
  __builtin_memcpy(&bits, &most, 4);
  const int exponent = std::max(static_cast<int>(bits >> 23), 16);  // so that the inverse of the scale is a normal number
  const uint32_t scale_bits = (exponent - 14) << 23, inverse_bits = (254 + 14 - exponent) << 23;
  float inverse;
  __builtin_memcpy(scale, &scale_bits, 4), __builtin_memcpy(&inverse, &inverse_bits, 4);
  if (reduce_add(poison) != 0) *scale = __builtin_nanf("");
  else
    for (int i = 0; i < kBlock; i += W) store(words + i, (vi)_mm256_cvtps_epi32((__m256)(load<vf>(x + i) * splat(inverse))));
  for (int i = 0; i < kBlock; ++i) sum[i / (kBlock / 2)] += words[i];
  for (int i = 0; i < kBlock / 2; ++i) out[i * stride] = (words[2 * i] & 0xFFFF) | static_cast<uint32_t>(words[2 * i + 1]) << 16;
  half_sums[0] = sum[0], half_sums[stride] = sum[1];
}
#endif

// Fills one tile from rows of x; rows and inputs that x lacks are zeros.
static void fill_tile(const Tiles& tiles, const Rows& x, int64_t index, bool needs_sums) {
  const int64_t rows = tiles.rows_of(index), stride = kTileSizes[tile_index(rows)], padded_k = tiles.num_units * kBlock;
  uint32_t* out = tiles.tile(index);
  float* sums = tiles.tile_sums(index);
  if (rows < stride) std::memset(out, 0, stride * tiles.num_units * tiles.dwords_a_unit() * 4);
  if (rows < stride && needs_sums) std::memset(sums, 0, stride * tiles.num_units * 4);
  if (rows < stride && tiles.math == Math::kWords) {
    std::memset(tiles.tile_scales(index), 0, stride * tiles.num_units * 4);
    std::memset(tiles.tile_half_sums(index), 0, stride * tiles.num_units * 8);
  }
  const bool is_exact_pairs = tiles.math == Math::kPairs && !needs_sums;
  float* wide = is_exact_pairs ? nullptr : scratch().get<float>(Slot::kPanel, padded_k);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const int64_t row = index * kMaxTile + lane;
    const void* from = item_at(x.data, x.dtype, row * x.num_columns);
    if (!is_exact_pairs) {
      widen_row(from, x.dtype, x.num_columns, wide);
      std::memset(wide + x.num_columns, 0, (padded_k - x.num_columns) * 4);
    }
    if (tiles.math == Math::kPairs) {  // x is bfloat16: its bits as they are
      const int64_t whole = x.num_columns / 2;
      for (int64_t pair = 0; pair < whole; ++pair) __builtin_memcpy(out + pair * stride + lane, static_cast<const uint16_t*>(from) + 2 * pair, 4);
      for (int64_t pair = whole; pair < padded_k / 2; ++pair)
        out[pair * stride + lane] = 2 * pair < x.num_columns ? static_cast<const uint16_t*>(from)[2 * pair] : 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    } else if (tiles.math == Math::kWords) {
      for (int64_t unit = 0; unit < tiles.num_units; ++unit)
        fill_words(wide + unit * kBlock, stride, out + unit * 16 * stride + lane, tiles.tile_scales(index) + unit * stride + lane,
                   tiles.tile_half_sums(index) + unit * 2 * stride + lane);
#endif
    } else {
      fill_tile_row(tiles, wide, row, lane, stride, out);
    }
    if (needs_sums)
      for (int64_t unit = 0; unit < tiles.num_units; ++unit) {
        vf sum = vf{};
        for (int i = 0; i < kBlock; i += W) sum += load<vf>(wide + unit * kBlock + i);
        sums[unit * stride + lane] = reduce_add(sum);
      }
  }
}
