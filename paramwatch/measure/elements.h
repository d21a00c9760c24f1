// The types of elements that the kernels read, as native.py numbers them, and how the short ones become float32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
constexpr int64_t SIZE[] = {4, 8, 2, 2};

float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  float x;
  if (rest >= 0x7c00) {  // infinite, or no number
    const uint32_t bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  const uint32_t shifted = rest << 13;  // 2^112 corrects the exponent, of subnormal numbers as well
  std::memcpy(&x, &shifted, sizeof x);
  x *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits |= sign;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Elements as float32, which holds all of the three types exactly: where they are, or in `room`.
const float* as_floats(const char* at, int64_t type, int n, float* room) {
  if (type == FLOAT32) return reinterpret_cast<const float*>(at);
  const uint16_t* from = reinterpret_cast<const uint16_t*>(at);
  int i = 0;
  if (type == BFLOAT16) {
    for (; i < n; i++) {
      const uint32_t bits = uint32_t(from[i]) << 16;
      std::memcpy(room + i, &bits, sizeof bits);
    }
    return room;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) room[i] = from_half(from[i]);
  return room;
}

}  // namespace
