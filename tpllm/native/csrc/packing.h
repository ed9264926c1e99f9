// Laying matrices out as kernels.h describes.
#pragma once
#include <cstring>

#include "kernels.h"

namespace tpllm {

template <class T>
void pack_dense(const T* rows, int64_t n, int64_t k, int64_t stride, int64_t block, int64_t num_units, uint8_t* out, int pair) {
  T* to = reinterpret_cast<T*>(out);
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    const int64_t row = block * kBlock + lane;
    for (int64_t i = 0; i < num_units * kBlock; ++i) {
      const T value = row < n && i < k ? rows[row * stride + i] : T(0);
      to[(i / pair * kBlock + lane) * pair + i % pair] = value;
    }
  }
}

// The codes of one unit, [32 n][32 k], to its packed form.
inline void pack_unit(Format format, const uint8_t (&codes)[kBlock][kBlock], uint8_t* out) {
  static constexpr int kByteOf[4] = {0, 2, 1, 3};
  const bool is_bytes = format == Format::kI8 || format == Format::kE4M3 || format == Format::kE5M2;
  for (int lane = 0; lane < kBlock; ++lane) {
    const uint8_t* code = codes[lane];
    if (is_bytes) {
      for (int k = 0; k < kBlock; ++k) out[(k / 4 * kBlock + lane) * 4 + kByteOf[k % 4]] = code[k];
      continue;
    }
    const bool is_narrow = format == Format::kQ2 || format == Format::kQ3;
    const int num_low = is_narrow ? 2 : 4, low_bits = is_narrow ? 2 : 4, low_bytes = num_low * kBlock * 4;
    uint32_t nibbles[4] = {}, single = 0, pairs[2] = {}, low_pairs[2] = {};
    for (int k = 0; k < kBlock; ++k) {
      const int pair = k / 2, half = k % 2 * 16;
      nibbles[k / 8] |= (code[k] & 0xFu) << (4 * (pair % 4) + half);
      low_pairs[k / 16] |= (code[k] & 3u) << (2 * (pair % 8) + half);
      single |= (code[k] >> low_bits & 1u) << (pair + half);
      pairs[k / 16] |= (code[k] >> 4 & 3u) << (2 * (pair % 8) + half);
    }
    for (int i = 0; i < num_low; ++i) std::memcpy(out + (i * kBlock + lane) * 4, is_narrow ? &low_pairs[i] : &nibbles[i], 4);
    if (format == Format::kQ5 || format == Format::kQ3) std::memcpy(out + low_bytes + lane * 4, &single, 4);
    if (format == Format::kQ6)
      for (int i = 0; i < 2; ++i) std::memcpy(out + low_bytes + (i * kBlock + lane) * 4, &pairs[i], 4);
  }
}

// Packs blocks [first, last) of an [n, k] matrix whose rows are row_stride items apart; items are floats, halves, bfloat16s or, for codes, bytes.
// out is of block `first` on. Padding is zeros.
inline bool pack_blocks(Format format, const void* rows, int64_t n, int64_t k, int64_t row_stride, int64_t first, int64_t last, uint8_t* out) {
  const int64_t num_units = (k + kBlock - 1) / kBlock, unit = unit_bytes(format);
  if (unit == 0) return false;
  for (int64_t block = first; block < last; ++block) {
    uint8_t* to = out + (block - first) * num_units * unit;
    if (format == Format::kF32) pack_dense(static_cast<const uint32_t*>(rows), n, k, row_stride, block, num_units, to, 1);
    else if (format == Format::kF16) pack_dense(static_cast<const uint16_t*>(rows), n, k, row_stride, block, num_units, to, 1);
    else if (format == Format::kBF16) pack_dense(static_cast<const uint16_t*>(rows), n, k, row_stride, block, num_units, to, 2);
    else
      for (int64_t u = 0; u < num_units; ++u) {
        uint8_t codes[kBlock][kBlock] = {};
        for (int64_t lane = 0; lane < kBlock && block * kBlock + lane < n; ++lane) {
          const int64_t count = k - u * kBlock < kBlock ? k - u * kBlock : kBlock;
          std::memcpy(codes[lane], static_cast<const uint8_t*>(rows) + (block * kBlock + lane) * row_stride + u * kBlock, count);
        }
        pack_unit(format, codes, to + u * unit);
      }
  }
  return true;
}

}  // namespace tpllm
