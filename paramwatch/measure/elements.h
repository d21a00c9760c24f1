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
  const uint32_t rest = half & 0x7fff, more = 112u << 23;  // so much larger the exponent is in float32
  uint32_t bits = (rest << 13) + more;
  float x;
  if (rest >= 0x7c00) bits += more;  // infinite, or no number
  if (rest < 0x0400) bits += 1u << 23;
  std::memcpy(&x, &bits, sizeof x);
  // what is subnormal stands behind the one of 2^-14 until now: no step meets a subnormal float32, which the CPU may be told to flush
  if (rest < 0x0400) x -= 0x1p-14f;
  return half & 0x8000 ? -x : x;
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
