// The parts of many tensors on the CPU, each byte read once. Called through ctypes by native.py; knows nothing of Python or torch.
//
// A tensor is cut into chunks, whatever the number of threads, and the chunks are folded in order: the same bits for any of them. Inside a
// chunk sums are of float64 and about a pivot, the first finite element: (pivot - mean)^2 is at most the number of elements times the
// variance, so that at most 5 of 16 digits cancel. A block is first read as if all of it were finite; the sum of squares tells whether it
// was, or the largest magnitude where squares may overflow, and only a block that was not is read again, from the cache.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "elements.h"
#include "lanes.h"
#include "sums.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements that one thread takes at a time
constexpr int BLOCK = 1024;         // elements that are read twice where need be, and stay in the first cache meanwhile
constexpr int AHEAD = 4096;         // bytes to prefetch ahead: memory is slower than the sums
constexpr int64_t WORTH_A_THREAD = 1 << 18;
constexpr int64_t PAST_THE_CACHE = 1 << 22;  // elements of which copies are gone from the caches before they are read again

constexpr int HALF = Lanes<double>::N;

// What is read: the elements of a tensor.
template <class T> struct Elements {
  typedef T Type;
  static constexpr bool SQUARES_STAY_FINITE = sizeof(T) == 4;
  const T* x;
  T one(int i) const { return x[i]; }
  typename Lanes<T>::V several(int i) const {
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + AHEAD);
    return load<typename Lanes<T>::V>(x + i);
  }
};

// Or their differences, which are exact in float64 but for the last digit.
template <class T> struct Differences {
  typedef double Type;
  static constexpr bool SQUARES_STAY_FINITE = sizeof(T) == 4;  // of float32 and their differences, in float64
  const T *x, *before;
  double one(int i) const { return double(x[i]) - double(before[i]); }
  Wide several(int i) const {
    typedef T Some __attribute__((vector_size(HALF * sizeof(T))));
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + AHEAD);
    __builtin_prefetch(reinterpret_cast<const char*>(before + i) + AHEAD);
    return __builtin_convertvector(load<Some>(x + i), Wide) - __builtin_convertvector(load<Some>(before + i), Wide);
  }
};

// One element at a time, whatever it is.
template <class Source> void read_any(const Source& source, int start, int end, Sums& sums) {
  typedef Lanes<typename Source::Type> L;
  for (int i = start; i < end; i++) {
    const auto x = source.one(i);
    const auto size = magnitude(x);
    if (size >= L::INFINITE) {
      (size > L::INFINITE ? sums.nan : x > 0 ? sums.posinf : sums.neginf) += 1;
      continue;
    }
    const double apart = double(x) - sums.pivot;
    sums.finite += 1, sums.first += apart, sums.second += apart * apart, sums.zero += x == 0;
    if (x < sums.least) sums.least = x;
    if (x > sums.most) sums.most = x;
  }
}

// Whole vectors, if all are finite; otherwise nothing is added and the answer is false.
template <class Source> bool read_finite(const Source& source, int n, Sums& sums) {
  typedef Lanes<typename Source::Type> L;
  constexpr int N = L::N;
  typename L::V least = typename L::V{} + typename Source::Type(INF), most = -least;
  typename L::I zero = {}, largest = {};
  const typename L::I mask = typename L::I{} + L::MAGNITUDE;
  const Wide pivot = Wide{} + sums.pivot;
  Wide first = {}, second = {}, first_high = {}, second_high = {};
  for (int i = 0; i < n; i += N) {
    const typename L::V v = source.several(i);
    zero -= (typename L::I)(v == 0);
    if constexpr (!Source::SQUARES_STAY_FINITE) {
      const typename L::I size = (typename L::I)v & mask;
      largest = size > largest ? size : largest;
    }
    least = v < least ? v : least;
    most = v > most ? v : most;
    if constexpr (sizeof(v[0]) == 4) {
      const auto* half = reinterpret_cast<const char*>(&v);
      const Wide low = __builtin_convertvector(load<typename L::Narrow>(half), Wide) - pivot;
      const Wide high = __builtin_convertvector(load<typename L::Narrow>(half + BYTES / 2), Wide) - pivot;
      first += low, second += low * low;
      first_high += high, second_high += high * high;
    } else {
      const Wide apart = v - pivot;
      first += apart, second += apart * apart;
    }
  }
  first += first_high, second += second_high;
  typedef typename Source::Type T;
  const double added = folded<Sum, double, HALF>(first), squares = folded<Sum, double, HALF>(second);
  if constexpr (Source::SQUARES_STAY_FINITE) {
    if (!std::isfinite(squares)) return false;
  } else {
    if (folded<Most, typename L::Int, N>(largest) >= L::INFINITE) return false;
  }
  sums.first += added, sums.second += squares;
  sums.zero += double(folded<Sum, typename L::Int, N>(zero));
  sums.least = Least::of(double(folded<Least, T, N>(least)), sums.least);
  sums.most = Most::of(double(folded<Most, T, N>(most)), sums.most);
  sums.finite += n;
  return true;
}

template <class Source> void read_block(const Source& source, int n, Sums& sums) {
  typedef Lanes<typename Source::Type> L;
  for (int i = 0; i < n && !sums.pivoted; i++)
    if (magnitude(source.one(i)) < L::INFINITE) sums.pivot = source.one(i), sums.pivoted = true;
  const int whole = n / L::N * L::N;
  if (whole && !read_finite(source, whole, sums)) read_any(source, 0, whole, sums);
  read_any(source, whole, n, sums);
}

// ---- what is asked for ----------------------------------------------------------------------

// A row of the table: addresses as integers, 0 where there is none.
struct Row {
  int64_t x, n, type;
  int64_t copy_to;          // the elements are copied there as they are read
  int64_t before;           // of the same type: what is measured is x - before
  int64_t grad, grad_type;  // with `before`: for the inner product; the type is negative where there is none
};

struct Job {
  const Row* row;
  int64_t start;
  bool past;
  Sums found, after;
};

// Written past the caches, memory is not read before it is written, and what the training step needs stays where it is.
void copy(char* to, const char* from, int64_t bytes, bool past) {
  int64_t done = 0;
#if defined(__AVX2__)
  if (past && reinterpret_cast<uintptr_t>(to) % 32 == 0)
    for (; done + 32 <= bytes; done += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + done)));
#endif
  std::memcpy(to + done, from + done, bytes - done);
}

template <class Source> void add_product(const Source& moved, const char* at, int64_t type, int n, Sums& sums) {
  float room[BLOCK];
  const double* wide = reinterpret_cast<const double*>(at);
  const float* narrow = type == FLOAT64 ? nullptr : as_floats(at, type, n, room);
  for (int i = 0; i < n; i++) {
    const double one = moved.one(i), other = narrow ? narrow[i] : wide[i];
    if (std::isfinite(one) && std::isfinite(other)) sums.dot += one * other;
  }
}

// A block of one type, with its past and its gradient.
template <class T> void read(const Row& row, const T* x, const T* before, int64_t at, int n, bool itself, Sums& sums, Sums& after) {
  if (!before) return read_block(Elements<T>{x}, n, sums);
  const Differences<T> moved{x, before};
  read_block(moved, n, sums);
  if (itself) read_block(Elements<T>{x}, n, after);
  if (row.grad_type < 0) return;
  add_product(moved, reinterpret_cast<const char*>(row.grad) + at * SIZE[row.grad_type], row.grad_type, n, sums);
}

// A chunk. It fills what it is given: to hand a dozen numbers on costs as much as to read a small tensor.
void work(const Row& row, int64_t start, int64_t end, bool past, bool itself, Sums& sums, Sums& after) {
  float room[BLOCK], old_room[BLOCK];
  const int64_t size = SIZE[row.type];
  for (int64_t at = start; at < end; at += BLOCK) {
    const int n = int(end - at < BLOCK ? end - at : BLOCK);
    const char* x = reinterpret_cast<const char*>(row.x) + at * size;
    const char* old = row.before ? reinterpret_cast<const char*>(row.before) + at * size : nullptr;
    if (row.copy_to) copy(reinterpret_cast<char*>(row.copy_to) + at * size, x, n * size, past);
    if (row.type == FLOAT64)
      read(row, reinterpret_cast<const double*>(x), reinterpret_cast<const double*>(old), at, n, itself, sums, after);
    else
      read(row, as_floats(x, row.type, n, room), old ? as_floats(old, row.type, n, old_room) : nullptr, at, n, itself, sums, after);
  }
#if defined(__AVX2__)
  if (past) _mm_sfence();
#endif
  sums.close();
  if (itself) after.close();
}

int64_t end_of(const Row& row, int64_t start) { return row.n - start < CHUNK ? row.n : start + CHUNK; }

// Several threads take chunks as they come.
void do_all(std::vector<Job>& jobs, bool itself, int64_t threads) {
  std::atomic<size_t> next{0};
  const auto take = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs.size();) {
      Job& job = jobs[i];
      work(*job.row, job.start, end_of(*job.row, job.start), job.past, itself, job.found, job.after);
    }
  };
  in_threads(threads, take);
}

}  // namespace

// Rows of the table -> float64 [rows, parts]; of rows with `before` also the parts of x itself in `after` (may be null).
extern "C" void paramwatch_measure(const int64_t* table, int64_t rows, double* parts, double* after, int64_t threads) {
  const Row* row = reinterpret_cast<const Row*>(table);
  int64_t total = 0, chunks = 0;
  for (int64_t i = 0; i < rows; i++)
    if (row[i].type >= 0) total += row[i].n, chunks += (row[i].n + CHUNK - 1) / CHUNK;
  const bool past = total >= PAST_THE_CACHE;
  const int64_t most = total / WORTH_A_THREAD < threads ? total / WORTH_A_THREAD : threads;
  std::vector<Job> jobs;  // in the order of the table
  if (most > 1) {
    jobs.reserve(chunks);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t start = 0; row[i].type >= 0 && start < row[i].n; start += CHUNK) jobs.push_back({&row[i], start, past, {}, {}});
    do_all(jobs, after != nullptr, most);
  }
  size_t done = 0;
  for (int64_t i = 0; i < rows; i++) {
    double *const to = parts + i * PARTS, *const to_after = after ? after + i * PARTS : nullptr;
    if (row[i].type < 0) {
      for (int part = 0; part < PARTS; part++) to[part] = NAN;
      continue;
    }
    Sums found, itself;
    if (most <= 1 && row[i].n <= CHUNK) {
      work(row[i], 0, row[i].n, past, after != nullptr, found, itself);
    } else {
      for (int64_t start = 0; start < row[i].n; start += CHUNK) {
        if (most > 1) {
          found.add(jobs[done].found), itself.add(jobs[done++].after);
          continue;
        }
        Sums chunk, chunk_after;
        work(row[i], start, end_of(row[i], start), past, after != nullptr, chunk, chunk_after);
        found.add(chunk), itself.add(chunk_after);
      }
    }
    found.write(to, double(row[i].n), row[i].grad_type >= 0);
    if (after) itself.write(to_after, double(row[i].n), false);
  }
}
