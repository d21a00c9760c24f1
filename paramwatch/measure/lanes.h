// Several elements at once: the vectors of the CPU at hand, and how their lanes become one number.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T, int N> struct Vector {
  typedef T V __attribute__((vector_size(N * sizeof(T))));
};

template <class T> struct Lanes;

template <> struct Lanes<float> {
  typedef int32_t Int;
  static constexpr int N = BYTES / 4;
  static constexpr Int MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;
  typedef Vector<float, N>::V V;
  typedef Vector<Int, N>::V I;
  typedef Vector<float, N / 2>::V Narrow;
};

template <> struct Lanes<double> {
  typedef int64_t Int;
  static constexpr int N = BYTES / 8;
  static constexpr Int MAGNITUDE = 0x7fffffffffffffff, INFINITE = 0x7ff0000000000000;
  typedef Vector<double, N>::V V;
  typedef Vector<Int, N>::V I;
};

typedef Lanes<double>::V Wide;

template <class T> typename Lanes<T>::Int magnitude(T x) {
  typename Lanes<T>::Int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & Lanes<T>::MAGNITUDE;
}

template <class V> V load(const void* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

struct Sum {
  template <class V> static V of(V one, V other) { return one + other; }
};
struct Least {
  template <class V> static V of(V one, V other) { return one < other ? one : other; }
};
struct Most {
  template <class V> static V of(V one, V other) { return one > other ? one : other; }
};

// Half with half, which takes no branch: one that depends on the elements is mispredicted half the time.
template <class How, class T, int N, class V> T folded(V v) {
  if constexpr (N == 2) {
    return How::of(T(v[0]), T(v[1]));
  } else {
    typedef typename Vector<T, N / 2>::V Half;
    return folded<How, T, N / 2>(How::of(load<Half>(&v), load<Half>(reinterpret_cast<const char*>(&v) + sizeof(Half))));
  }
}

}  // namespace
