// Runs every kernel of every instruction set that this processor has, for the sanitizers: `make native-asan` and `make native-tsan`.
//
// Every array has a heap allocation of exactly its size, so that AddressSanitizer sees what is read or written past it, and results begin as
// NaNs. Three threads call at once, each on pools of 1, 2 and 4 threads. All bits must be the same on each pool and for one row at a time as
// for all; products and lookups are also compared with loops in double. tests/native/test_*.py compare the rest with references.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "packing.h"
#include "team.h"

namespace tpllm {
namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "native_driver: %s\n", what.c_str());
  std::_Exit(1);  // other threads are still at work
}

class Threads : public Pool {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Threads() override {  // runs what is queued: the lobby counts on those that it has asked for
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
    }
    woken_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const override { return static_cast<int64_t>(threads_.size()); }
  void schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push(std::move(task));
    }
    woken_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable woken_;
  std::queue<std::function<void()>> tasks_;
  bool is_closing_ = false;
  std::vector<std::thread> threads_;

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      woken_.wait(lock, [this] { return is_closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
      lock.lock();
    }
  }
};

std::vector<std::unique_ptr<Threads>> pools;
std::atomic<int64_t> num_calls{0};

// --- arrays ----------------------------------------------------------------------------------------------------------------------------
int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kF16 || dtype == Dtype::kBF16 ? 2 : 1; }

struct Array {
  Dtype dtype = Dtype::kU8;
  int64_t count = 0;
  std::unique_ptr<uint8_t[]> data;

  Array() = default;
  Array(Dtype type, int64_t items) : dtype(type), count(items), data(new uint8_t[items * bytes_of(type)]) {
    std::memset(data.get(), 0xFF, size());  // NaN as a float of any dtype
  }
  int64_t size() const { return count * bytes_of(dtype); }
  Array slice(int64_t first, int64_t items) const {
    Array part(dtype, items);
    std::memcpy(part.data.get(), data.get() + first * bytes_of(dtype), part.size());
    return part;
  }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data.get()); }
  double operator[](int64_t i) const {
    switch (dtype) {
      case Dtype::kF32: return as<float>()[i];
      case Dtype::kF16: return static_cast<float>(as<Half>()[i]);
      case Dtype::kBF16: {
        const uint32_t bits = static_cast<uint32_t>(as<uint16_t>()[i]) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
      }
      case Dtype::kI8: return as<int8_t>()[i];
      case Dtype::kU8: case Dtype::kE4M3: return as<uint8_t>()[i];
      case Dtype::kE8M0: return std::ldexp(1.0, as<uint8_t>()[i] - 127);
    }
    return 0;
  }
  void put(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == Dtype::kF32) as<float>()[i] = x;
    else if (dtype == Dtype::kF16) as<Half>()[i] = static_cast<Half>(x);
    else if (dtype == Dtype::kBF16) as<uint16_t>()[i] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    else as<uint8_t>()[i] = static_cast<uint8_t>(static_cast<int>(x));
  }
};

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  float uniform(float low, float high) { return low + (high - low) * static_cast<float>(next() >> 40) / (1 << 24); }
  int integer(int low, int high) { return low + static_cast<int>(next() % (high - low + 1)); }
  Array array(Dtype dtype, int64_t count, float low, float high) {  // of integer dtypes, low and high among them
    Array x(dtype, count);
    const bool is_integer = bytes_of(dtype) == 1;
    for (int64_t i = 0; i < count; ++i) x.put(i, is_integer ? integer(low, high) : uniform(low, high));
    return x;
  }

 private:
  uint64_t state_;
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9, z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
};

// --- weights ---------------------------------------------------------------------------------------------------------------------------
struct Case {
  Format format;
  int group = 0, zero = 0;
  bool has_mins = false;
  int super_group = 0;
  bool quantizes_input = false;
  Dtype scale_dtype = Dtype::kF32;  // of dense formats: no scales
  bool has_zeros = false;           // for mins

  Dtype min_dtype() const { return has_zeros ? Dtype::kU8 : scale_dtype; }

  bool takes(int64_t k) const { return group == 0 || (k + kBlock - 1) / kBlock * kBlock % group == 0; }
};
constexpr Dtype F32 = Dtype::kF32, F16 = Dtype::kF16, BF16 = Dtype::kBF16, I8 = Dtype::kI8, U8 = Dtype::kU8, E4M3 = Dtype::kE4M3,
                E8M0 = Dtype::kE8M0;
constexpr Dtype kWord = F32;  // whole numbers of 32 bits have no Dtype
constexpr Case kCases[] = {
    {Format::kF32}, {Format::kF16}, {Format::kBF16}, {Format::kI8}, {Format::kI8, 0, 1}, {Format::kI8, 128, 0, false, 0, false, F16},
    {Format::kI8, 0, 0, false, 0, true}, {Format::kI8, 0, 1, false, 0, true, F16}, {Format::kE4M3}, {Format::kE4M3, 128},
    {Format::kE4M3, 32, 0, true}, {Format::kE5M2, 0, 0, false, 0, false, BF16}, {Format::kE5M2, 64},
    {Format::kI4, 0, 8}, {Format::kI4, 32, 8, false, 0, false, F16}, {Format::kI4, 64, 0, true, 0, false, BF16}, {Format::kI4, 96, 8},
    {Format::kI4, 256, 0, true}, {Format::kI4, 32, 0, true, 256, false, U8},
    {Format::kI4, 32, 0, true, 0, false, F16, true}, {Format::kQ2, 32, 2, false, 0, false, F16}, {Format::kQ2, 64, 0, true, 0, false, F32, true},
    {Format::kQ3, 32, 4, false, 0, false, BF16}, {Format::kQ3, 128, 0, true, 0, false, F16, true},
    {Format::kQ5, 32, 16, false, 0, false, F16}, {Format::kQ5, 32, 0, true, 0, false, F16}, {Format::kQ5, 32, 0, true, 256, false, U8},
    {Format::kQ6, 16, 32, false, 0, false, F16}, {Format::kQ6, 32, 32}, {Format::kQ6, 16, 32, false, 256, false, I8},
    {Format::kE2M1, 32, 0, false, 0, false, E8M0}, {Format::kE2M1, 16, 0, false, 0, false, E8M0}, {Format::kE2M1, 16, 0, false, 0, false, F16},
};
constexpr Dtype kFloats[] = {F32, BF16, F16};

double float_value(int code, int sign, int mantissa, int bias) {
  const int magnitude = code & (sign - 1), exponent = magnitude >> mantissa;
  const double rest = std::ldexp(magnitude & ((1 << mantissa) - 1), -mantissa);
  return (code & sign ? -1 : 1) * (exponent ? std::ldexp(1 + rest, exponent - bias) : std::ldexp(rest, 1 - bias));
}

struct Matrix {
  Array codes, scales, mins, super_scales, super_mins, bias;
  std::vector<double> dense;  // [n, k]
  Weight weight{};

  Matrix(const Case& c, int64_t n, int64_t k, bool has_bias, Dtype x_dtype, Random& random) {
    const int64_t padded_k = (k + kBlock - 1) / kBlock * kBlock, blocks = (n + kBlock - 1) / kBlock, padded_n = blocks * kBlock;
    const bool is_dense = c.format <= Format::kBF16, is_e4m3 = c.format == Format::kE4M3, is_fp8 = is_e4m3 || c.format == Format::kE5M2;
    const Dtype item = is_dense ? static_cast<Dtype>(c.format) : c.format == Format::kI8 ? I8 : U8;  // dense ones have the same numbers
    const int num_codes = c.format == Format::kQ2 ? 4 : c.format == Format::kQ3 ? 8 : c.format == Format::kI4 || c.format == Format::kE2M1 ? 16 : c.format == Format::kQ5 ? 32 : 64;
    const float largest = is_e4m3 ? 448 : c.format == Format::kE5M2 ? 57344 : item == I8 ? 127 : num_codes;
    Array rows = random.array(item, n * k, item == I8 ? -127 - c.zero : is_dense ? -1 : 0, is_dense ? 1 : item == I8 ? 127 : num_codes - 1);
    if (is_fp8)  // all but infinities and NaNs
      for (int64_t i = 0; i < n * k; ++i) rows.put(i, random.integer(0, is_e4m3 ? 0x7E : 0x7B) + random.integer(0, 1) * 0x80);
    codes = Array(U8, blocks * (padded_k / kBlock) * unit_bytes(c.format));
    if (!pack_blocks(c.format, rows.data.get(), n, k, k, 0, blocks, codes.data.get())) fail("a format cannot be packed");

    const int64_t num_groups = c.group ? padded_k / c.group : 1, num_supers = c.super_group ? (padded_k + c.super_group - 1) / c.super_group : 0;
    const bool has_levels = num_supers > 0;
    if (c.scale_dtype == E8M0) scales = random.array(E8M0, padded_n * num_groups, 118, 124);
    else if (!is_dense)
      scales = random.array(c.scale_dtype, padded_n * num_groups, has_levels ? (c.scale_dtype == U8 ? 1 : -128) : 0.5f / largest,
                            has_levels ? (c.scale_dtype == U8 ? 63 : 127) : 1.5f / largest);
    if (c.has_mins)
      mins = random.array(c.min_dtype(), padded_n * num_groups, has_levels || c.has_zeros ? 0 : -0.5f, has_levels ? 63 : c.has_zeros ? num_codes - 1 : 0.5f);
    if (has_levels) super_scales = random.array(F16, padded_n * num_supers, 0.5f / 64 / largest, 1.5f / 64 / largest);
    if (has_levels && c.has_mins) super_mins = random.array(F16, padded_n * num_supers, 0.5f / 64, 1.5f / 64);
    if (has_bias) bias = random.array(x_dtype, n, -1, 1);

    dense.resize(n * k);
    for (int64_t i = 0; i < n * k; ++i) {
      const int64_t block = i / k / kBlock, lane = i / k % kBlock, at = i % k;
      const int64_t group = (block * num_groups + (c.group ? at / c.group : 0)) * kBlock + lane;
      const int64_t super = has_levels ? (block * num_supers + at / c.super_group) * kBlock + lane : 0;
      double value = is_fp8 ? float_value(static_cast<int>(rows[i]), 0x80, is_e4m3 ? 3 : 2, is_e4m3 ? 7 : 15) :
                     c.format == Format::kE2M1 ? float_value(static_cast<int>(rows[i]), 8, 1, 1) : rows[i] - (item == U8 ? c.zero : 0);
      if (!is_dense) value *= scales[group] * (has_levels ? super_scales[super] : 1);
      if (c.has_mins) value += mins[group] * (has_levels ? -super_mins[super] : c.has_zeros ? -scales[group] : 1);
      dense[i] = value;
    }
    weight = {codes.data.get(), scales.data.get(), mins.data.get(), super_scales.data.get(), super_mins.data.get(), bias.data.get(), c.format,
              c.scale_dtype, c.min_dtype(), x_dtype, n, k, padded_k, c.group, c.super_group, c.zero, c.quantizes_input};
  }
};

// --- checks ----------------------------------------------------------------------------------------------------------------------------
using Arrays = std::vector<Array>;

// The results of call(pool, first row, rows) for all rows, which are the same on each pool for any of `counts` (the last is all) rows.
template <class CALL>
Arrays check(const std::string& what, const std::vector<int64_t>& counts, const CALL& call) {
  const int64_t most = counts.back();
  std::vector<std::string> expected;
  for (int64_t row = 0; row < most; ++row) {
    const Arrays results = call(*pools[row % pools.size()], row, 1);
    expected.resize(results.size());
    for (size_t i = 0; i < results.size(); ++i) expected[i].append(results[i].as<char>(), results[i].size());
  }
  Arrays all;
  for (const int64_t count : counts)
    for (const auto& pool : pools) {
      all = call(*pool, 0, count);
      ++num_calls;
      for (size_t i = 0; i < all.size(); ++i) {
        const std::string where = what + ", result " + std::to_string(i) + " of " + std::to_string(count) + " rows";
        if (all[i].size() * most != static_cast<int64_t>(expected[i].size()) * count) fail(where + " has a wrong size");
        if (std::memcmp(all[i].data.get(), expected[i].data(), all[i].size()) != 0)
          fail(where + " with " + std::to_string(pool->num_threads()) + " threads is not that of one row at a time");
        for (int64_t j = 0; j < all[i].count; ++j)
          if (!std::isfinite(all[i][j])) fail(where + " is not finite");
      }
    }
  return all;
}

void compare(const std::string& what, const Array& found, const std::vector<double>& expected, bool is_wide) {
  double difference = 0, size = 1e-6 * found.count;  // halves below 6e-5 are not exact to 3 digits
  for (int64_t i = 0; i < found.count; ++i) difference += std::pow(found[i] - expected[i], 2), size += expected[i] * expected[i];
  const double error = std::sqrt(difference / size);
  char numbers[100];
  std::snprintf(numbers, sizeof numbers, " is off by %g; it begins with %g for %g", error, found[0], expected[0]);
  if (!(error < (is_wide ? 2e-3 : 5e-3))) fail(what + numbers);
}

Rows rows_of(const Array& array, int64_t num_rows, int64_t num_columns) { return {array.data.get(), array.dtype, num_rows, num_columns}; }

// --- kernels ---------------------------------------------------------------------------------------------------------------------------
const std::vector<int64_t> kCounts{0, 1, 2, 7, 12, 13, 40};

// Products of one input with weights of three kinds.
void test_linear(const Kernels& kernels, const std::string& what, const Case* const (&cases)[3], int64_t k, Dtype dtype, Random random) {
  const int64_t sizes[] = {33, 1, 65};
  std::vector<Matrix> matrices;
  for (int i = 0; i < 3; ++i) matrices.emplace_back(*cases[i], sizes[i], k, i != 1, dtype, random);
  const std::vector<Weight> weights{matrices[0].weight, matrices[1].weight, matrices[2].weight};
  const Array x = random.array(dtype, kCounts.back() * k, -1, 1);
  const Arrays results = check(what, kCounts, [&](Pool& pool, int64_t first, int64_t count) {
    const Array part = x.slice(first * k, count * k);
    Arrays outs;
    std::vector<Rows> rows;
    for (int i = 0; i < 3; ++i) {
      outs.emplace_back(i == 2 ? F32 : dtype, count * sizes[i]);
      rows.push_back(rows_of(outs[i], count, sizes[i]));
    }
    Team team(pool, 0);
    kernels.linear(team, rows_of(part, count, k), weights.data(), rows.data(), 3);
    return outs;
  });
  for (int i = 0; i < 3; ++i) {
    std::vector<double> expected;
    for (int64_t row = 0; row < kCounts.back(); ++row) {
      std::vector<double> given(k);
      float most = 0;
      for (int64_t j = 0; j < k; ++j) given[j] = x[row * k + j], most = std::max(most, static_cast<float>(std::fabs(given[j])));
      if (cases[i]->quantizes_input)
        for (double& item : given) item = std::nearbyint(static_cast<float>(item) * (127.0f / most)) * (most / 127.0f);
      for (int64_t n = 0; n < sizes[i]; ++n) {
        double sum = i != 1 ? matrices[i].bias[n] : 0;
        for (int64_t j = 0; j < k; ++j) sum += given[j] * matrices[i].dense[n * k + j];
        expected.push_back(sum);
      }
    }
    compare(what + ", result " + std::to_string(i), results[i], expected, dtype == F32);
  }
}

void test_gated_mlp(const Kernels& kernels, const std::string& what, const Case* const (&cases)[3], int64_t k, int64_t inner, const Gating& gating,
                    Dtype dtype, Random random) {
  const int64_t n = 33;
  const Matrix gate(*cases[0], inner, k, true, dtype, random), up(*cases[1], inner, k, false, dtype, random);
  const Matrix down(*cases[2], n, inner, true, dtype, random);
  const Array x = random.array(dtype, 13 * k, -1, 1);
  check(what, {0, 1, 2, 7, 13}, [&](Pool& pool, int64_t first, int64_t count) {
    const Array part = x.slice(first * k, count * k);
    Arrays outs;
    outs.emplace_back(dtype, count * n);
    Team team(pool, 0);
    kernels.gated_mlp(team, rows_of(part, count, k), gate.weight, up.weight, down.weight, gating, rows_of(outs[0], count, n));
    return outs;
  });
}

void test_lookup(const Kernels& kernels, const std::string& what, const Case& c, int64_t k, Dtype dtype, Random random) {
  const int32_t tokens[] = {32, -1, 0, 33, 17, 31, 5, 1000, 32};
  const int64_t count = sizeof(tokens) / sizeof(tokens[0]);
  const Matrix table(c, 33, k, false, dtype, random);
  const Arrays results = check(what, {0, 1, 2, count}, [&](Pool& pool, int64_t first, int64_t num) {
    const std::vector<int32_t> part(tokens + first, tokens + first + num);
    Arrays outs;
    outs.emplace_back(dtype, num * k);
    Team team(pool, 0);
    kernels.lookup(team, part.data(), table.weight, rows_of(outs[0], num, k));
    return outs;
  });
  std::vector<double> expected(count * k);
  for (int64_t i = 0; i < count * k; ++i)
    if (tokens[i / k] >= 0 && tokens[i / k] < 33) expected[i] = table.dense[tokens[i / k] * k + i % k];
  compare(what, results[0], expected, dtype == F32);
}

void test_sums(const Kernels& kernels, const std::string& what, int64_t d, Dtype dtype, Dtype weight_dtype, bool has_delta, Random random) {
  const Array x = random.array(dtype, kCounts.back() * d, -2, 2), delta = random.array(dtype, x.count, -1, 1);
  const Array weight = random.array(weight_dtype, d, 0, 2);
  check(what, kCounts, [&](Pool& pool, int64_t first, int64_t count) {
    const Array part = x.slice(first * d, count * d), added = delta.slice(first * d, count * d);
    const Rows delta_rows = rows_of(added, count, d);
    Arrays outs;
    for (int i = 0; i < 1 + has_delta; ++i) outs.emplace_back(dtype, count * d);
    const Rows sum_rows = rows_of(outs.back(), count, d);
    Team team(pool, 0);
    kernels.rms_norm(team, rows_of(part, count, d), has_delta ? &delta_rows : nullptr, weight.data.get(), weight_dtype, 1e-5f,
                     rows_of(outs[0], count, d), has_delta ? &sum_rows : nullptr);
    if (dtype == F32) {
      outs.emplace_back(F32, count);
      kernels.row_sums(team, rows_of(part, count, d), outs.back().as<float>());
    }
    return outs;
  });
}

struct AttentionCase {
  std::vector<int> starts;  // -1: a row of padding
  int T, num_padding, N, K, H, R, S;
  std::vector<int32_t> rows;
  int window;
  float softcap;
  Dtype dtype, cache_dtype;
  int page_size = 0;            // 0: a row is a page
  std::vector<int> pieces = {};  // tokens of each row, one row after the other in one batch row, then the padding; T is not read
  bool has_sinks = false;
};
const AttentionCase kAttentions[] = {
    {{70, 0, -1, 199}, 1, 0, 4, 2, 64, 64, 200, {}, 0, 0, F32, F32},
    {{70, 0, -1, 199}, 1, 0, 4, 2, 64, 64, 200, {3, 0, 5, 1}, 0, 0, BF16, BF16},
    {{70, 0, 130}, 1, 0, 4, 2, 40, 40, 200, {}, 0, 0, F32, F16},
    {{70, 0, 199}, 1, 0, 8, 2, 64, 64, 200, {}, 0, 0, BF16, I8},
    {{70, 0, 199}, 3, 1, 8, 1, 20, 8, 202, {}, 50, 0, F16, I8},
    {{127, 64}, 2, 0, 12, 2, 33, 32, 129, {1, 0}, 64, 0, BF16, BF16},
    {{1, 64, 190}, 9, 4, 4, 2, 7, 6, 200, {2, 0, 1}, 0, 0, F16, F16},
    {{195, 10}, 9, 0, 3, 3, 1, 0, 200, {}, 20, 0, F32, F32},            // beyond the cache
    {{20, 30, 40}, 2, 0, 2, 2, 32, 32, 65, {6, 1, -1}, 0, 0, F32, I8},  // not rows of the cache
    {{70}, 100, 3, 4, 2, 16, 16, 170, {2}, 0, 3, F32, I8},
    {{0}, 130, 0, 2, 1, 48, 48, 130, {}, 17, 0, BF16, BF16},
    {{5, 77}, 1, 0, 1, 1, 6, 0, 78, {}, 0, 1.5f, F32, BF16},
    {{1099, 511, 512}, 1, 0, 2, 1, 32, 32, 1100, {}, 700, 0, F32, F32},
    {{1099}, 1, 0, 4, 2, 31, 30, 1100, {1}, 0, 0, BF16, I8},
    {{1050}, 40, 1, 2, 1, 32, 32, 1100, {}, 0, 0, F32, F16},
    {{1050}, 5, 0, 40, 1, 9, 8, 1060, {}, 600, 2, F16, F16},
    {{70, 0, 199}, 1, 0, 8, 2, 64, 64, 200, {}, 0, 0, F32, E4M3},
    {{70, 0, -1, 199}, 1, 0, 4, 2, 64, 64, 200, {3, 0, 2, 1}, 0, 0, F32, F32, 16},
    {{70, 0, -1, 207}, 1, 0, 4, 2, 40, 40, 208, {}, 0, 0, BF16, BF16, 16},
    {{1, 64, 190}, 9, 4, 4, 2, 7, 6, 200, {2, 0, 1}, 0, 0, F16, F16, 32},
    {{70}, 100, 3, 4, 2, 16, 16, 170, {2}, 0, 3, F32, I8, 64},
    {{127, 64}, 2, 0, 12, 2, 33, 32, 160, {1, 0}, 64, 0, BF16, E4M3, 80},
    {{1099}, 1, 0, 4, 2, 31, 30, 1100, {1}, 0, 0, BF16, I8, 128},
    {{1099, 700}, 3, 0, 2, 1, 32, 32, 1104, {4, 1}, 600, 0, F32, F16, 48},
    {{70, 90, 100}, 3, 0, 4, 2, 32, 32, 200, {5, 1, 4}, 0, 0, F32, BF16, 16},    // rows that lack pages
    {{90, 70, 100}, 3, 0, 2, 2, 20, 8, 200, {5, 6, -1}, 0, 0, BF16, I8, 32},     // and rows that are not there
    {{200, 205}, 9, 0, 3, 3, 1, 0, 208, {}, 20, 0, F32, F32, 16},               // beyond the last page
    {{64, 70, 199}, 0, 6, 4, 2, 32, 32, 200, {2, 0, 3}, 0, 0, F32, F32, 16, {40, 1, 1}},
    {{10, 1050, 3}, 0, 2, 12, 1, 33, 32, 1100, {1, 4, 0}, 300, 0, BF16, I8, 64, {1, 13, 30}},
    {{90, 0, 60, 100}, 0, 1, 2, 2, 20, 8, 160, {5, 0, 6, 2}, 0, 1.5f, F16, BF16, 32, {3, 70, 2, 9}},
    {{64, 70, 199}, 0, 6, 4, 2, 32, 32, 200, {2, 0, 3}, 0, 0, F32, F32, 0, {40, 1, 1}},
    {{1099, 511, -1}, 1, 0, 4, 2, 31, 30, 1100, {}, 0, 0, BF16, I8, 0, {}, true},
    {{70}, 100, 3, 6, 2, 16, 16, 170, {2}, 20, 3, F32, F32, 0, {}, true},
    {{1099, 511, -1}, 1, 0, 4, 2, 31, 30, 1100, {}, 0, 0, BF16, F16, 32, {}, true},
    {{10, 1050, 90}, 0, 2, 12, 1, 33, 32, 1100, {1, 4, 5}, 300, 0, F32, E4M3, 64, {1, 13, 30}, true},
};

// The pages of each of num_rows rows, in any order; some of the last row's are missing.
Array shuffled_pages(int64_t num_rows, int64_t L, int64_t num_pages, Random& random) {
  std::vector<int32_t> order(num_pages);
  for (int64_t i = 0; i < num_pages; ++i) order[i] = static_cast<int32_t>(i);
  for (int64_t i = num_pages - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, static_cast<int>(i))]);
  Array pages(kWord, num_rows * L);
  for (int64_t i = 0; i < num_rows * L; ++i)
    pages.as<int32_t>()[i] = i < (num_rows - 1) * L || i % 3 == 0 ? order[i] : i % 3 == 1 ? -1 : static_cast<int32_t>(num_pages) * (1 + i);
  return pages;
}

// A row here is a token: all at once, or one after the other with the cache that the ones before have left.
void test_attention(const Kernels& kernels, const std::string& what, const AttentionCase& c, Random random) {
  const bool is_ragged = !c.pieces.empty(), is_paged = c.page_size > 0;
  int64_t most = static_cast<int64_t>(c.starts.size()) * c.T;
  if (is_ragged) {
    most = c.num_padding;
    for (const int piece : c.pieces) most += piece;
  }
  const int64_t B = is_ragged ? 1 : c.starts.size(), T = most / B, num_rows = 6;
  const int64_t S = is_paged ? c.page_size : c.S, L = (c.S + S - 1) / S, P = num_rows * L + (is_paged ? 3 : 0), entries = P * c.K * S;
  const Array q = random.array(c.dtype, most * c.N * c.H, -2, 2), k = random.array(c.dtype, most * c.K * c.H, -2, 2);
  const Array v = random.array(c.dtype, most * c.K * c.H, -2, 2);
  const Array cos = random.array(F32, most * c.R, -1, 1), sin = random.array(F32, most * c.R, -1, 1);
  const Array sinks = random.array(F32, c.N, -2, 4);
  const bool is_int8 = c.cache_dtype == I8, is_e4m3 = c.cache_dtype == E4M3, is_scaled = is_int8 || is_e4m3;
  Arrays cache;
  for (int i = 0; i < 2; ++i)
    cache.push_back(random.array(c.cache_dtype, entries * c.H, is_int8 ? -127 : is_e4m3 ? 0 : -2, is_int8 ? 127 : is_e4m3 ? 0x7E : 2));
  for (int i = 0; i < 2; ++i) cache.push_back(random.array(F32, is_scaled ? entries : 0, 0.01f, 0.03f));
  const Array pages = shuffled_pages(num_rows, L, P, random);
  Array positions(kWord, most), rows(kWord, B), rows_of_tokens(kWord, most);
  for (int64_t i = 0, piece = 0, t = 0; i < most; ++i, ++t) {
    while (t == (!is_ragged ? T : piece < static_cast<int64_t>(c.pieces.size()) ? c.pieces[piece] : -1)) ++piece, t = 0;
    const bool is_padding = i >= most - c.num_padding || c.starts[piece] < 0;
    positions.as<int32_t>()[i] = is_padding ? -1 : c.starts[piece] + t;
    const bool has_row = piece < static_cast<int64_t>(c.starts.size());
    rows_of_tokens.as<int32_t>()[i] = !has_row ? 0 : c.rows.empty() ? piece : c.rows[piece];
  }
  for (int64_t i = 0; i < B; ++i) rows.as<int32_t>()[i] = rows_of_tokens.as<int32_t>()[i * T];

  Arrays now;
  check(what, {most}, [&](Pool& pool, int64_t first, int64_t count) {
    const bool is_whole = count == most;
    if (first == 0) {
      now.clear();
      for (const Array& array : cache) now.push_back(array.slice(0, array.count));
    }
    const Array q_part = q.slice(first * c.N * c.H, count * c.N * c.H), k_part = k.slice(first * c.K * c.H, count * c.K * c.H);
    const Array v_part = v.slice(first * c.K * c.H, count * c.K * c.H), cos_part = cos.slice(first * c.R, count * c.R);
    const Array sin_part = sin.slice(first * c.R, count * c.R), positions_part = positions.slice(first, count);
    const Array rows_part = is_ragged || !is_whole ? rows_of_tokens.slice(first, count) : rows.slice(0, B);
    Arrays outs;
    outs.emplace_back(c.dtype, count * c.N * c.H);
    AttentionArgs args{q_part.data.get(), k_part.data.get(), v_part.data.get(), now[0].data.get(), now[1].data.get(),
                       is_scaled ? now[2].as<float>() : nullptr, is_scaled ? now[3].as<float>() : nullptr, positions_part.as<int32_t>(),
                       is_whole && c.rows.empty() ? nullptr : rows_part.as<int32_t>(), is_paged ? pages.as<int32_t>() : nullptr,
                       cos_part.as<float>(), sin_part.as<float>(), c.has_sinks ? sinks.as<float>() : nullptr, outs[0].data.get(),
                       c.dtype, c.cache_dtype, is_whole ? B : 1, is_whole ? T : 1, c.N, c.K, c.H, c.R, P, S, num_rows, L, is_ragged && is_whole,
                       1 / std::sqrt(static_cast<float>(c.H)), c.softcap, c.window};
    Team team(pool, 0);
    kernels.attention(team, args);
    for (const Array& array : now) outs.push_back(array.slice(0, first + count == most ? array.count : 0));
    return outs;
  });
}

// --- all of it -------------------------------------------------------------------------------------------------------------------------
using Tests = std::vector<std::function<void()>>;

void add_tests(const Kernels& kernels, Tests& tests) {
  const auto add = [&](const std::string& what, auto test) {
    const std::string name = std::string(kernels.name) + ", " + what;
    tests.push_back([=, seed = tests.size()] { test(name, Random(seed)); });
  };
  for (const int64_t k : {1, 31, 41, 257, 250}) {
    std::vector<const Case*> cases;
    for (const Case& c : kCases)
      if (c.takes(k)) cases.push_back(&c);
    for (size_t i = 0; i < cases.size(); ++i) {
      const Case* const three[] = {cases[i], cases[(i + 1) % cases.size()], cases[(i + 2) % cases.size()]};
      const std::string which = " of case " + std::to_string(three[0] - kCases) + ", " + std::to_string(k) + " inputs";
      for (const Dtype dtype : kFloats)
        add("linear" + which + ", dtype " + std::to_string(static_cast<int>(dtype)), [=, &kernels](const std::string& what, Random random) {
          test_linear(kernels, what, {three[0], three[1], three[2]}, k, dtype, random);
        });
      const Dtype dtype = kFloats[i % 3];
      add("lookup" + which, [=, &kernels](const std::string& what, Random random) { test_lookup(kernels, what, *three[0], k, dtype, random); });
      if (k != 41 && k != 250) continue;
      add("gated MLP" + which, [=, &kernels](const std::string& what, Random random) {
        test_gated_mlp(kernels, what, {three[0], three[1], three[2]}, k, k, Gating{static_cast<Activation>(i % 5), 0.7f, 1.702f}, dtype, random);
      });
    }
    for (int i = 0; i < 6; ++i)
      add("norm " + std::to_string(i) + " of " + std::to_string(k), [=, &kernels](const std::string& what, Random random) {
        test_sums(kernels, what, k, kFloats[i % 3], kFloats[(i + k) % 3], i < 3, random);
      });
  }
  for (const AttentionCase& c : kAttentions)
    add("attention " + std::to_string(&c - kAttentions), [&kernels, &c](const std::string& what, Random random) {
      test_attention(kernels, what, c, random);
    });
}

void run_all() {
  for (const int count : {1, 2, 4}) pools.push_back(std::make_unique<Threads>(count));
  std::string names = kernel_names(), name;
  Tests tests;
  for (std::istringstream stream(names); stream >> name;) {
    const Kernels* kernels = find_kernels(name.c_str());
    if (!kernels || name != kernels->name) fail(name + " is not found");
    add_tests(*kernels, tests);
  }
  if (find_kernels("no such set")) fail("an instruction set that does not exist is found");
  std::atomic<size_t> next{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&] {
      for (size_t test; (test = next++) < tests.size();) tests[test]();
    });
  for (std::thread& caller : callers) caller.join();
  pools.clear();
  std::printf("native_driver: %zu tests, %ld compared calls with %s: ok\n", tests.size(), static_cast<long>(num_calls), names.c_str());
}

}  // namespace
}  // namespace tpllm

int main() { tpllm::run_all(); }
