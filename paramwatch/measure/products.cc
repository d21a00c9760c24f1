// The inner products of some vectors, of the one that they should add up to, and of what is missing from that: each byte read once. Called
// through ctypes by products.py.
//
// Chunks, whatever the number of threads, are folded in order: the same bits for any of them. Inside a chunk a block of each vector becomes
// float64 and stays in the cache while all pairs of them are multiplied. NaN and infinities go their way through the sums.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"
#include "lanes.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements of each vector that one thread takes at a time
constexpr int64_t CACHED = 1 << 14;  // elements in float64 that stay in the cache
constexpr int64_t LEAST = 64, MOST = 1024;  // elements of a block
constexpr int64_t WORTH_A_THREAD = 1 << 18;
constexpr int AT_ONCE = 4;

constexpr int LANES = Lanes<double>::N;
constexpr int STRIDE = 2 * LANES;  // two sums of each product at a time: an addition takes several cycles

struct Vectors {
  const int64_t* table;  // address and type of each of K vectors, and of the one that they should add up to
  int64_t k, n;
  bool all;  // whether the K vectors are multiplied with each other, or only with themselves and the other two
  int64_t block;

  int64_t size() const { return k + 2; }
  // The pairs of vector i are (i, i), and (i, j) from this j on.
  int64_t others(int64_t i) const { return all || i >= k ? i + 1 : k; }
  int64_t pairs() const {
    int64_t count = 0;
    for (int64_t i = 0; i < size(); i++) count += 1 + size() - others(i);
    return count;
  }
};

Wide load(const double* at) {
  Wide wide;
  std::memcpy(&wide, at, sizeof wide);
  return wide;
}

// One vector with N that lie one after another.
template <int N> void multiply(const double* x, const double* y, int64_t apart, int64_t n, double* sums) {
  Wide even[N] = {}, odd[N] = {};
  for (int64_t at = 0; at < n; at += STRIDE) {
    const Wide one = load(x + at), next = load(x + at + LANES);
    for (int i = 0; i < N; i++) {
      even[i] += one * load(y + i * apart + at);
      odd[i] += next * load(y + i * apart + at + LANES);
    }
  }
  for (int i = 0; i < N; i++) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += even[i][lane] + odd[i][lane];
    sums[i] += sum;
  }
}

// With any number of them.
double* multiply(const double* x, const double* y, int64_t many, int64_t apart, int64_t n, double* sums) {
  for (; many >= AT_ONCE; many -= AT_ONCE, y += AT_ONCE * apart, sums += AT_ONCE) multiply<AT_ONCE>(x, y, apart, n, sums);
  if (many == 3) multiply<3>(x, y, apart, n, sums);
  if (many == 2) multiply<2>(x, y, apart, n, sums);
  if (many == 1) multiply<1>(x, y, apart, n, sums);
  return sums + many;
}

void widen(int64_t address, int64_t type, int64_t start, int64_t n, double* to) {
  const char* at = reinterpret_cast<const char*>(address) + start * SIZE[type];
  if (type == FLOAT64) {
    std::memcpy(to, at, n * sizeof(double));
    return;
  }
  float room[MOST];
  const float* from = as_floats(at, type, int(n), room);
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// The products of one chunk, pair by pair.
void work(const Vectors& of, int64_t start, std::vector<double>& room, double* sums) {
  const int64_t end = std::min(of.n, start + CHUNK), size = of.size(), block = of.block;
  for (; start < end; start += block) {
    const int64_t n = std::min(block, end - start), padded = (n + STRIDE - 1) / STRIDE * STRIDE;
    double *const total = &room[of.k * block], *const missing = total + block;
    for (int64_t i = 0; i <= of.k; i++) {
      widen(of.table[2 * i], of.table[2 * i + 1], start, n, &room[i * block]);
      std::fill(&room[i * block] + n, &room[i * block] + padded, 0.0);
    }
    std::fill(missing, missing + padded, 0.0);
    for (int64_t i = 0; i < of.k; i++)
      for (int64_t at = 0; at < padded; at++) missing[at] += room[i * block + at];
    for (int64_t at = 0; at < padded; at++) missing[at] = total[at] - missing[at];
    double* to = sums;
    for (int64_t i = 0; i < size; i++) {
      const double* x = &room[i * block];
      const int64_t j = of.others(i);
      if (j > i + 1) to = multiply(x, x, 1, block, padded, to);
      const int64_t first = j > i + 1 ? j : i;
      to = multiply(x, &room[first * block], size - first, block, padded, to);
    }
  }
}

}  // namespace

// Into float64 [k + 2, k + 2]; products that are not asked for are NaN.
extern "C" void paramwatch_products(const int64_t* table, int64_t k, int64_t n, int64_t all, double* products, int64_t threads) {
  Vectors of{table, k, n, all != 0, 0};
  of.block = std::min(MOST, std::max(LEAST, CACHED / of.size() / LEAST * LEAST));
  const int64_t size = of.size(), pairs = of.pairs(), chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<double> sums(chunks * pairs);
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    std::vector<double> room(size * of.block);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) work(of, i * CHUNK, room, &sums[i * pairs]);
  };
  in_threads(std::min(threads, n * size / WORTH_A_THREAD), take);

  std::fill(products, products + size * size, NAN);
  int64_t pair = 0;
  const auto put = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) sum += sums[chunk * pairs + pair];
    products[i * size + j] = products[j * size + i] = sum;
    pair++;
  };
  for (int64_t i = 0; i < size; i++) {
    put(i, i);
    for (int64_t j = of.others(i); j < size; j++) put(i, j);
  }
}
