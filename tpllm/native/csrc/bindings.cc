// XLA FFI handlers: buffers in, kernels, buffers out. Shapes are checked in Python and once more here, where a mistake would read past an array.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "packing.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tpllm {
namespace {

const Kernels*& current_kernels() {
  static const Kernels* kernels = find_kernels(std::getenv("TPLLM_ISA"));
  return kernels;
}

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

ffi::Error invalid(const std::string& message) { return ffi::Error::InvalidArgument("tpllm: " + message); }

bool to_dtype(ffi::DataType type, Dtype* out) {
  switch (type) {
    case ffi::DataType::F32: *out = Dtype::kF32; return true;
    case ffi::DataType::F16: *out = Dtype::kF16; return true;
    case ffi::DataType::BF16: *out = Dtype::kBF16; return true;
    case ffi::DataType::S8: *out = Dtype::kI8; return true;
    case ffi::DataType::U8: *out = Dtype::kU8; return true;
    case ffi::DataType::F8E4M3FN: *out = Dtype::kE4M3; return true;
    default: return false;
  }
}

bool is_float(Dtype dtype) { return dtype == Dtype::kF32 || dtype == Dtype::kF16 || dtype == Dtype::kBF16; }

bool to_rows(const ffi::AnyBuffer& buffer, Rows* rows) {
  const auto dims = buffer.dimensions();
  if (dims.size() != 2 || !to_dtype(buffer.element_type(), &rows->dtype) || !is_float(rows->dtype)) return false;
  rows->data = buffer.untyped_data(), rows->num_rows = dims[0], rows->num_columns = dims[1];
  return true;
}

// A weight is described by this many attributes: format, n, k, group, super_group, zero, quantizes_input, and which arrays it has.
constexpr size_t kWeightAttributes = 12;

// Reads the arrays and attributes of one weight; nothing larger than the arrays may be described.
ffi::Error read_weight(const ffi::RemainingArgs& args, size_t* next, ffi::Span<const int64_t> attributes, size_t index, Dtype x_dtype, Weight* out) {
  const int64_t* a = attributes.begin() + index * kWeightAttributes;
  Weight w{};
  w.format = static_cast<Format>(a[0]), w.n = a[1], w.k = a[2], w.group = a[3], w.super_group = a[4], w.zero = a[5], w.quantizes_input = a[6];
  w.padded_k = (w.k + kBlock - 1) / kBlock * kBlock;
  auto take = [&](bool is_there, int64_t least_items, bool needs_dtype, Dtype dtype, const void** to, Dtype* found) -> bool {
    if (!is_there) return true;
    auto buffer = args.get<ffi::AnyBuffer>((*next)++);
    if (!buffer || static_cast<int64_t>(buffer->element_count()) < least_items) return false;
    Dtype own;
    if (!to_dtype(buffer->element_type(), &own) || (needs_dtype && own != dtype)) return false;
    if (found) *found = own;
    *to = buffer->untyped_data();
    return true;
  };
  const int64_t padded_n = w.num_blocks() * kBlock, unit = unit_bytes(w.format);
  if (unit == 0 || w.n < 0 || w.k <= 0 || w.group < 0 || (w.group && (w.group < 16 || w.padded_k % w.group || (w.group > 16 && w.group % 32)))) return invalid("a weight's description is no valid one");
  const bool is_known = w.quantizes_input ? w.format == Format::kI8 && !w.group : w.group == 0 ? w.format < Format::kQ5 && !a[8]
                        : w.group == kBlock / 2 ? (w.format == Format::kQ6 || w.format == Format::kE2M1) && !a[8] : w.format > Format::kBF16;
  if (!is_known) return invalid("no kernel takes such groups, mins or int8 inputs with this format");
  const int64_t num_groups = w.group ? w.padded_k / w.group : 1, num_supers = w.super_group ? (w.padded_k + w.super_group - 1) / w.super_group : 0;
  auto codes = args.get<ffi::AnyBuffer>((*next)++);
  if (!codes || static_cast<int64_t>(codes->size_bytes()) < w.num_blocks() * w.num_units() * unit) return invalid("a weight's codes are shorter than its shape");
  w.codes = static_cast<const uint8_t*>(codes->untyped_data());
  if (!take(a[7], padded_n * num_groups, false, Dtype::kF32, &w.scales, &w.scale_dtype) ||
      !take(a[8], padded_n * num_groups, false, Dtype::kF32, &w.mins, &w.min_dtype) ||
      !take(a[9], padded_n * num_supers, true, Dtype::kF16, &w.super_scales, nullptr) ||
      !take(a[10], padded_n * num_supers, true, Dtype::kF16, &w.super_mins, nullptr) || !take(a[11], w.n, true, x_dtype, &w.bias, &w.bias_dtype))
    return invalid("a weight's scales, mins or bias do not fit its shape");
  if (w.group && !w.scales) return invalid("groups without scales");
  if (w.format == Format::kE2M1 && w.scale_dtype == Dtype::kU8) w.scale_dtype = Dtype::kE8M0;
  if (w.mins && !is_float(w.min_dtype) && (w.min_dtype != Dtype::kU8 || !(w.super_mins || is_float(w.scale_dtype))))
    return invalid("mins are floats, or unsigned bytes beside scales that are floats or under super mins");
  *out = w;
  return ffi::Error::Success();
}

#define TPLLM_RETURN_IF(expression)                   \
  do {                                                \
    if (auto error = (expression); error.failure()) return error; \
  } while (0)

ffi::Error check_kernels() {
  return current_kernels() ? ffi::Error::Success() : invalid("TPLLM_ISA names no instruction set that runs here; use one of " + std::string(kernel_names()));
}

ffi::Error linear(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> attributes, int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  Rows x;
  auto input = args.get<ffi::AnyBuffer>(0);
  if (!input || !to_rows(*input, &x)) return invalid("linear takes a matrix of floats");
  const size_t count = attributes.size() / kWeightAttributes;
  if (rets.size() != count) return invalid("linear gives one result a weight");
  std::vector<Weight> weights(count);
  std::vector<Rows> outs(count);
  size_t next = 1;
  for (size_t i = 0; i < count; ++i) {
    TPLLM_RETURN_IF(read_weight(args, &next, attributes, i, x.dtype, &weights[i]));
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (!ret || !to_rows(**ret, &outs[i]) || outs[i].num_rows != x.num_rows || outs[i].num_columns != weights[i].n || weights[i].k != x.num_columns)
      return invalid("the shapes of a product do not match");
  }
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  current_kernels()->linear(team, x, weights.data(), outs.data(), count);
  return ffi::Error::Success();
}

ffi::Error gated_mlp(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> attributes, int64_t activation,
                     float limit, float alpha, int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  Rows x, out;
  auto input = args.get<ffi::AnyBuffer>(0);
  auto ret = rets.get<ffi::AnyBuffer>(0);
  if (!input || !ret || !to_rows(*input, &x) || !to_rows(**ret, &out) || attributes.size() != 3 * kWeightAttributes)
    return invalid("the gated MLP takes a matrix and three weights");
  Weight weights[3];
  size_t next = 1;
  for (size_t i = 0; i < 3; ++i) TPLLM_RETURN_IF(read_weight(args, &next, attributes, i, x.dtype, &weights[i]));
  const auto& [gate, up, down] = weights;
  if (gate.k != x.num_columns || up.k != gate.k || gate.n != up.n || down.k != gate.n || down.n != out.num_columns || out.num_rows != x.num_rows ||
      out.dtype != x.dtype)
    return invalid("the shapes of a gated MLP do not match");
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  current_kernels()->gated_mlp(team, x, gate, up, down, Gating{static_cast<Activation>(activation), limit, alpha}, out);
  return ffi::Error::Success();
}

// The weight of one of the matrices that lie below each other in w, each from a multiple of kBlock outputs on.
Weight matrix_of(const Weight& w, int64_t first_row, int64_t num_rows) {
  Weight one = w;
  const int64_t block = first_row / kBlock, num_groups = w.group ? w.padded_k / w.group : 1;
  const int64_t num_supers = w.super_group ? (w.padded_k + w.super_group - 1) / w.super_group : 0;
  auto advance = [block](const void* from, int64_t bytes_a_row) {
    return from ? static_cast<const void*>(static_cast<const uint8_t*>(from) + block * kBlock * bytes_a_row) : nullptr;
  };
  one.n = num_rows;
  one.codes = w.block_codes(block);
  one.scales = advance(w.scales, num_groups * item_bytes(w.scale_dtype));
  one.mins = advance(w.mins, num_groups * item_bytes(w.min_dtype));
  one.super_scales = advance(w.super_scales, num_supers * item_bytes(Dtype::kF16));
  one.super_mins = advance(w.super_mins, num_supers * item_bytes(Dtype::kF16));
  one.bias = advance(w.bias, item_bytes(w.bias_dtype));
  return one;
}

// A gated MLP for each expert and those rows that are its own: counts[e] of them, one expert after the other. Rows beyond are left as they are.
ffi::Error expert_mlps(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> counts, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Span<const int64_t> attributes, int64_t activation, float limit, float alpha, int64_t inner_size, int64_t outer_size,
                       int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  Rows x, out;
  auto input = args.get<ffi::AnyBuffer>(0);
  auto ret = rets.get<ffi::AnyBuffer>(0);
  if (!input || !ret || !to_rows(*input, &x) || !to_rows(**ret, &out) || attributes.size() != 3 * kWeightAttributes)
    return invalid("experts take a matrix and three weights");
  Weight weights[3];
  size_t next = 1;
  for (size_t i = 0; i < 3; ++i) TPLLM_RETURN_IF(read_weight(args, &next, attributes, i, x.dtype, &weights[i]));
  const auto& [gate, up, down] = weights;
  const int64_t num_experts = static_cast<int64_t>(counts.element_count());
  auto step = [](int64_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; };
  if (inner_size < 1 || outer_size < 1 || gate.k != x.num_columns || up.k != gate.k || down.k != inner_size || gate.n != num_experts * step(inner_size) ||
      up.n != gate.n || down.n != num_experts * step(outer_size) || out.num_columns != outer_size || out.num_rows != x.num_rows || out.dtype != x.dtype)
    return invalid("the shapes of experts do not match");
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  const int64_t x_bytes = x.num_columns * item_bytes(x.dtype), out_bytes = out.num_columns * item_bytes(out.dtype);
  int64_t first = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = counts.typed_data()[e];
    if (count < 0 || count > x.num_rows - first) return invalid("the experts have more rows than there are");
    if (count == 0) continue;
    const Rows own{static_cast<uint8_t*>(x.data) + first * x_bytes, x.dtype, count, x.num_columns};
    const Rows result{static_cast<uint8_t*>(out.data) + first * out_bytes, out.dtype, count, out.num_columns};
    current_kernels()->gated_mlp(team, own, matrix_of(gate, e * step(inner_size), inner_size), matrix_of(up, e * step(inner_size), inner_size),
                                 matrix_of(down, e * step(outer_size), outer_size), Gating{static_cast<Activation>(activation), limit, alpha}, result);
    first += count;
  }
  return ffi::Error::Success();
}

ffi::Error lookup(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> tokens, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> result,
                  ffi::Span<const int64_t> attributes, int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  Rows out;
  Weight table;
  if (!to_rows(*result, &out) || attributes.size() != kWeightAttributes) return invalid("lookup gives a matrix from one table");
  size_t next = 0;
  TPLLM_RETURN_IF(read_weight(args, &next, attributes, 0, out.dtype, &table));
  if (static_cast<int64_t>(tokens.element_count()) != out.num_rows || out.num_columns != table.k) return invalid("the shapes of a lookup do not match");
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  current_kernels()->lookup(team, tokens.typed_data(), table, out);
  return ffi::Error::Success();
}

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs deltas, ffi::Result<ffi::AnyBuffer> out,
                    ffi::RemainingRets sums, float eps, int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  Rows rows, normed, delta, sum;
  Dtype weight_dtype;
  if (!to_rows(x, &rows) || !to_rows(*out, &normed) || !to_dtype(weight.element_type(), &weight_dtype) || deltas.size() != sums.size() ||
      static_cast<int64_t>(weight.element_count()) != rows.num_columns || normed.num_rows != rows.num_rows || normed.num_columns != rows.num_columns)
    return invalid("the shapes of a norm do not match");
  const bool has_delta = deltas.size() == 1 && sums.size() == 1;
  if (has_delta) {
    auto buffer = deltas.get<ffi::AnyBuffer>(0);
    auto ret = sums.get<ffi::AnyBuffer>(0);
    if (!buffer || !ret || !to_rows(*buffer, &delta) || !to_rows(**ret, &sum) || delta.num_rows != rows.num_rows ||
        delta.num_columns != rows.num_columns || delta.dtype != rows.dtype || sum.num_rows != rows.num_rows || sum.num_columns != rows.num_columns ||
        sum.dtype != rows.dtype)
      return invalid("what is added before a norm has another shape");
  }
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  current_kernels()->rms_norm(team, rows, has_delta ? &delta : nullptr, weight.untyped_data(), weight_dtype, eps, normed, has_delta ? &sum : nullptr);
  return ffi::Error::Success();
}

ffi::Error row_sums(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  const auto dims = x.dimensions();
  if (dims.size() != 2 || static_cast<int64_t>(out->element_count()) != dims[0]) return invalid("row sums take a matrix and give one number a row");
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  current_kernels()->row_sums(team, Rows{x.untyped_data(), Dtype::kF32, dims[0], dims[1]}, out->typed_data());
  return ffi::Error::Success();
}

// Rows and pages of the cache; see AttentionArgs.
ffi::Error read_table(const ffi::Buffer<ffi::S32>& rows, const ffi::Buffer<ffi::S32>& pages, AttentionArgs* a) {
  const auto page_dims = pages.dimensions();
  const int64_t num_rows = rows.element_count();
  a->pages = page_dims.size() == 2 ? pages.typed_data() : nullptr;
  a->num_rows = a->pages ? page_dims[0] : a->P, a->L = a->pages ? page_dims[1] : 1;
  a->is_ragged = rows.dimensions().size() == 2, a->rows = a->is_ragged || num_rows ? rows.typed_data() : nullptr;
  if (a->rows && num_rows != (a->is_ragged ? a->B * a->T : a->B)) return invalid("there are as many rows as batch rows, or as tokens");
  if (!a->rows && a->B > a->num_rows) return invalid("more batch rows than rows of the page table");
  if (a->L > 1 && a->S % 16) return invalid("pages of a row that has several hold a multiple of 16 tokens");
  return ffi::Error::Success();
}

// q, k, v, cos, sin, positions, rows, pages, sinks, then the cache: keys, values and, of int8 ones, their scales. The cache's results are its
// arguments.
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::F32> sinks, ffi::RemainingArgs cache,
                     ffi::Result<ffi::AnyBuffer> out, ffi::RemainingRets updated, float scale, float softcap, int64_t window, int64_t max_threads) {
  TPLLM_RETURN_IF(check_kernels());
  AttentionArgs a{};
  const auto q_dims = q.dimensions(), k_dims = k.dimensions();
  auto keys = updated.get<ffi::AnyBuffer>(0), values = updated.get<ffi::AnyBuffer>(1);
  if (q_dims.size() != 4 || k_dims.size() != 4 || !keys || !values || !to_dtype(q.element_type(), &a.dtype) ||
      !to_dtype((*keys)->element_type(), &a.cache_dtype) || (*keys)->dimensions().size() != 4)
    return invalid("attention takes arrays of four dims");
  const auto cache_dims = (*keys)->dimensions();
  a.B = q_dims[0], a.T = q_dims[1], a.N = q_dims[2], a.H = q_dims[3], a.K = k_dims[2], a.P = cache_dims[0], a.S = cache_dims[2];
  a.R = cos.dimensions().back();
  const int64_t num_tokens = a.B * a.T;
  if (!is_float(a.dtype) || out->element_type() != q.element_type() || (*values)->element_type() != (*keys)->element_type())
    return invalid("queries are no floats, or keys and values of two dtypes");
  if (a.K < 1 || a.N % a.K || cache_dims[1] != a.K || cache_dims[3] != a.H || a.R > a.H || a.R % 2 || k.element_type() != q.element_type() ||
      v.element_type() != q.element_type() || static_cast<int64_t>(k.element_count()) != num_tokens * a.K * a.H || v.element_count() != k.element_count() ||
      static_cast<int64_t>(cos.element_count()) != num_tokens * a.R || sin.element_count() != cos.element_count() ||
      static_cast<int64_t>(positions.element_count()) != num_tokens || (sinks.element_count() && static_cast<int64_t>(sinks.element_count()) != a.N) ||
      (*values)->element_count() != (*keys)->element_count() || updated.size() != (has_scales(a.cache_dtype) ? 4u : 2u) ||
      cache.size() != updated.size() || out->element_count() != q.element_count())
    return invalid("the shapes of attention and its cache do not match");
  TPLLM_RETURN_IF(read_table(rows, pages, &a));
  a.q = q.untyped_data(), a.k = k.untyped_data(), a.v = v.untyped_data(), a.cos = cos.typed_data(), a.sin = sin.typed_data();
  a.positions = positions.typed_data(), a.out = out->untyped_data();
  a.k_cache = (*keys)->untyped_data(), a.v_cache = (*values)->untyped_data();
  for (size_t i = 0; i < updated.size(); ++i) {
    auto given = cache.get<ffi::AnyBuffer>(i);
    auto result = updated.get<ffi::AnyBuffer>(i);
    if (!given || !result || given->untyped_data() != (*result)->untyped_data()) return invalid("the cache is not updated in place");
    if (i >= 2 && (static_cast<int64_t>((*result)->element_count()) != a.P * a.K * a.S || (*result)->element_type() != ffi::DataType::F32))
      return invalid("the cache's scales have another shape");
    if (i >= 2) (i == 2 ? a.k_scales : a.v_scales) = static_cast<float*>((*result)->untyped_data());
  }
  a.scale = scale, a.softcap = softcap, a.window = window, a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  XlaPool xla_pool(pool);
  Team team(xla_pool, max_threads);
  current_kernels()->attention(team, a);
  return ffi::Error::Success();
}

// How many threads XLA's pool has.
ffi::Error pool_size(ffi::ThreadPool pool, ffi::Result<ffi::Buffer<ffi::S32>> out) {
  out->typed_data()[0] = static_cast<int32_t>(pool.num_threads());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tpllm

#define TPLLM_EXPORT extern "C" __attribute__((visibility("default")))
#define TPLLM_HANDLER(name, binding)                                                              \
  TPLLM_EXPORT XLA_FFI_Error* tpllm_##name(XLA_FFI_CallFrame* frame) {                            \
    static auto* handler = ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() binding.To(tpllm::name).release(); \
    return handler->Call(frame);                                                                  \
  }
#define TPLLM_ARG(type) .Arg<ffi::type>()
#define TPLLM_WEIGHTS .Attr<ffi::Span<const int64_t>>("weights")
#define TPLLM_INT(name) .Attr<int64_t>(name)
#define TPLLM_FLOAT(name) .Attr<float>(name)

TPLLM_HANDLER(linear, .RemainingArgs().RemainingRets() TPLLM_WEIGHTS TPLLM_INT("max_threads"))
TPLLM_HANDLER(gated_mlp, .RemainingArgs().RemainingRets() TPLLM_WEIGHTS TPLLM_INT("activation") TPLLM_FLOAT("limit") TPLLM_FLOAT("alpha")
              TPLLM_INT("max_threads"))
TPLLM_HANDLER(expert_mlps, TPLLM_ARG(Buffer<ffi::S32>).RemainingArgs().RemainingRets() TPLLM_WEIGHTS TPLLM_INT("activation") TPLLM_FLOAT("limit")
              TPLLM_FLOAT("alpha") TPLLM_INT("inner_size") TPLLM_INT("outer_size") TPLLM_INT("max_threads"))
TPLLM_HANDLER(lookup, TPLLM_ARG(Buffer<ffi::S32>).RemainingArgs().Ret<ffi::AnyBuffer>() TPLLM_WEIGHTS TPLLM_INT("max_threads"))
TPLLM_HANDLER(rms_norm, TPLLM_ARG(AnyBuffer) TPLLM_ARG(AnyBuffer).RemainingArgs().Ret<ffi::AnyBuffer>().RemainingRets() TPLLM_FLOAT("eps")
              TPLLM_INT("max_threads"))
TPLLM_HANDLER(attention, TPLLM_ARG(AnyBuffer) TPLLM_ARG(AnyBuffer) TPLLM_ARG(AnyBuffer) TPLLM_ARG(Buffer<ffi::F32>) TPLLM_ARG(Buffer<ffi::F32>)
              TPLLM_ARG(Buffer<ffi::S32>) TPLLM_ARG(Buffer<ffi::S32>) TPLLM_ARG(Buffer<ffi::S32>) TPLLM_ARG(Buffer<ffi::F32>).RemainingArgs()
              .Ret<ffi::AnyBuffer>().RemainingRets()
              TPLLM_FLOAT("scale")
              TPLLM_FLOAT("softcap") TPLLM_INT("window") TPLLM_INT("max_threads"))
TPLLM_HANDLER(row_sums, TPLLM_ARG(Buffer<ffi::F32>).Ret<ffi::Buffer<ffi::F32>>() TPLLM_INT("max_threads"))
TPLLM_HANDLER(pool_size, .Ret<ffi::Buffer<ffi::S32>>())

// Whose headers this was built with: an older jaxlib refuses it, and with it all CPU devices.
TPLLM_EXPORT const char* tpllm_jaxlib_version() { return TPLLM_JAXLIB_VERSION; }
// The name of the instruction set in use, or an empty text where TPLLM_ISA names none that runs here; and of all that run here, best first.
TPLLM_EXPORT const char* tpllm_isa() { return tpllm::current_kernels() ? tpllm::current_kernels()->name : ""; }
TPLLM_EXPORT const char* tpllm_isas() { return tpllm::kernel_names(); }
// Takes another instruction set from now on; returns whether it runs here.
TPLLM_EXPORT int tpllm_use_isa(const char* name) {
  const tpllm::Kernels* kernels = tpllm::find_kernels(name);
  if (kernels) tpllm::current_kernels() = kernels;
  return kernels != nullptr;
}
// Packs blocks [first, last) of a matrix; see packing.h. Returns 0 where the format does not take such items.
TPLLM_EXPORT int tpllm_pack(int64_t format, const void* rows, int64_t n, int64_t k, int64_t row_stride, int64_t first, int64_t last, void* out) {
  return tpllm::pack_blocks(static_cast<tpllm::Format>(format), rows, n, k, row_stride, first, last, static_cast<uint8_t*>(out));
}
