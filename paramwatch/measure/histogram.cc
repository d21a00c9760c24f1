// Histograms of many tensors on the CPU: how many elements are in each of the bins of bins.py. Called through ctypes by histograms.py.
//
// An element is counted by its highest bits, which are its sign and its exponent, without being looked at any further. Neighbours are
// counted in tables of their own: they are often alike, and one counter would wait for itself. Whole numbers add up to the same in any
// order, so threads share the work as they like.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"
#include "threads.h"

namespace {

constexpr int LEAST = -63, MOST = 61, ZERO = MOST - LEAST + 3, BINS = 2 * ZERO + 1;  // as bins.py has them
constexpr int64_t CHUNK = 1 << 16;  // elements that one thread takes at a time
constexpr int BLOCK = 1024;         // elements that are made float64 at a time
constexpr int64_t WORTH_A_THREAD = 1 << 17;

int bin(bool negative, int exponent) {
  const int size = exponent < LEAST ? 1 : exponent > MOST ? ZERO : exponent - LEAST + 2;
  return negative ? ZERO - size : ZERO + size;
}

// Elements of one type: unsigned integers, in which the exponent begins at bit FIRST and is BIAS too large.
template <class Bits, int FIRST, int BIAS, int WAYS> struct Counter {
  static constexpr int SIGN = 8 * sizeof(Bits) - 1, EXPONENTS = 1 << (SIGN - FIRST);
  uint32_t table[WAYS][2 * EXPONENTS] = {};
  int64_t least = 0, bins[BINS] = {};

  void read(const Bits* x, int n) {
    int i = 0;
    for (; i + WAYS <= n; i += WAYS)
      for (int way = 0; way < WAYS; way++) table[way][x[i + way] >> FIRST]++;
    for (; i < n; i++) table[0][x[i] >> FIRST]++;
    int64_t now = 0;
    for (int way = 0; way < WAYS; way++) now += table[way][0] + table[way][EXPONENTS];
    if (now != least) look_closer(x, n, now - least);
    least = now;
  }

  // The least exponent is that of zeros and of all numbers that have no exponent of their own; these are rare.
  void look_closer(const Bits* x, int n, int64_t of_them) {
    int zeros = 0;
    for (int i = 0; i < n; i++) zeros += Bits(x[i] << 1) == 0;
    bins[ZERO] += zeros;
    for (int i = 0; i < n && zeros != of_them; i++) {
      const uint64_t rest = x[i] & ((Bits(1) << FIRST) - 1);
      if (rest && !((x[i] >> FIRST) % EXPONENTS)) bins[bin(x[i] >> SIGN, 63 - __builtin_clzll(rest) - FIRST + 1 - BIAS)]++, zeros++;
    }
  }

  void add_to(int64_t* counts) {
    for (int exponent = 1; exponent < EXPONENTS - 1; exponent++)  // the last one is of what is not finite
      for (int way = 0; way < WAYS; way++) {
        bins[bin(false, exponent - BIAS)] += table[way][exponent];
        bins[bin(true, exponent - BIAS)] += table[way][EXPONENTS + exponent];
      }
    for (int i = 0; i < BINS; i++)
      if (bins[i]) __atomic_fetch_add(counts + i, bins[i], __ATOMIC_RELAXED);
  }
};

typedef Counter<uint64_t, 52, 1023, 2> Doubles;

// ---- what is asked for ----------------------------------------------------------------------

// A row of the table: addresses as integers, 0 where there is none.
struct Row {
  int64_t x, n, type;
  int64_t before;  // of the same type: what is counted is x - before
};

struct Job {
  const Row* row;
  int64_t start, n, *counts;
};

template <class Counts, class Bits> void count(const Job& job) {
  Counts counts;
  counts.read(reinterpret_cast<const Bits*>(job.row->x) + job.start, int(job.n));
  counts.add_to(job.counts);
}

const double* as_doubles(int64_t address, int64_t type, int64_t at, int n, double* room) {
  const char* x = reinterpret_cast<const char*>(address) + at * SIZE[type];
  if (type == FLOAT64) return reinterpret_cast<const double*>(x);
  float narrow[BLOCK];
  const float* from = as_floats(x, type, n, narrow);
  for (int i = 0; i < n; i++) room[i] = from[i];
  return room;
}

// Of differences, and of elements that carry a factor, in float64.
void count_made(const Job& job, double scale) {
  Doubles counts;
  double room[BLOCK], old_room[BLOCK], made[BLOCK];
  uint64_t bits[BLOCK];
  for (int64_t at = job.start, end = job.start + job.n; at < end; at += BLOCK) {
    const int n = int(end - at < BLOCK ? end - at : BLOCK);
    const double* x = as_doubles(job.row->x, job.row->type, at, n, room);
    if (job.row->before) {
      const double* old = as_doubles(job.row->before, job.row->type, at, n, old_room);
      for (int i = 0; i < n; i++) made[i] = x[i] - old[i];
    } else {
      std::memcpy(made, x, n * sizeof *x);
    }
    for (int i = 0; i < n && scale != 1; i++) made[i] /= scale;
    std::memcpy(bits, made, n * sizeof *bits);
    counts.read(bits, n);
  }
  counts.add_to(job.counts);
}

void work(const Job& job, double scale) {
  if (job.row->before || scale != 1) return count_made(job, scale);
  switch (job.row->type) {
    case FLOAT32: return count<Counter<uint32_t, 23, 127, 4>, uint32_t>(job);
    case FLOAT64: return count<Doubles, uint64_t>(job);
    case BFLOAT16: return count<Counter<uint16_t, 7, 127, 4>, uint16_t>(job);
    case FLOAT16: return count<Counter<uint16_t, 10, 15, 8>, uint16_t>(job);
  }
}

}  // namespace

// Rows of the table -> int64 [rows, bins], which holds zeros before. `scale` is a factor that all elements carry, 1 for none.
extern "C" void paramwatch_histograms(const int64_t* table, int64_t rows, double scale, int64_t* counts, int64_t threads) {
  const Row* row = reinterpret_cast<const Row*>(table);
  std::vector<Job> jobs;
  int64_t total = 0;
  for (int64_t i = 0; i < rows; total += row[i++].n)
    for (int64_t start = 0; start < row[i].n; start += CHUNK)
      jobs.push_back({row + i, start, row[i].n - start < CHUNK ? row[i].n - start : CHUNK, counts + i * BINS});
  const int64_t most = total / WORTH_A_THREAD < threads ? total / WORTH_A_THREAD : threads;
  std::atomic<size_t> next{0};
  const auto take = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs.size();) work(jobs[i], scale);
  };
  in_threads(most, take);
}
