// The parts of many tensors on the CPU, each byte read once. Called through ctypes by native.py; knows nothing of Python or torch.
//
// A tensor is cut into chunks, whatever the number of threads, and the chunks are folded in order: the same bits for any of them. Inside a
// chunk sums are of float64 and about a pivot, the first finite element: (pivot - mean)^2 is at most the number of elements times the
// variance, so that at most 5 of 16 digits cancel. A block is first read as if all of it were finite; the largest magnitude, as an integer,
// tells whether it was, and only a block that was not is read again, from the cache.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements that one thread takes at a time
constexpr int BLOCK = 1024;         // elements that are read twice where need be, and stay in the first cache meanwhile
constexpr int AHEAD = 4096;         // bytes to prefetch ahead: memory is slower than the sums
constexpr int64_t WORTH_A_THREAD = 1 << 18;
constexpr double INF = INFINITY;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
constexpr int64_t SIZE[] = {4, 8, 2, 2};

// In the order of `columns.PARTS`.
enum Part { COUNT, NAN_, POSINF, NEGINF, ZERO, MEAN, STD, RMS, MIN, MAX, DOT, PARTS };

typedef double Wide __attribute__((vector_size(BYTES)));
constexpr int HALF = BYTES / 8;

template <class T> struct Lanes;

template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(BYTES)));
  typedef int32_t I __attribute__((vector_size(BYTES)));
  typedef float Narrow __attribute__((vector_size(BYTES / 2)));
  typedef int32_t Int;
  static constexpr int N = BYTES / 4;
  static constexpr Int MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;
};

template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(BYTES)));
  typedef int64_t I __attribute__((vector_size(BYTES)));
  typedef int64_t Int;
  static constexpr int N = BYTES / 8;
  static constexpr Int MAGNITUDE = 0x7fffffffffffffff, INFINITE = 0x7ff0000000000000;
};

// What is known of some elements, in a form that folds.
struct Found {
  double finite = 0, nan = 0, posinf = 0, neginf = 0, zero = 0;
  double mean = 0, apart = 0, squares = 0;  // `apart`: sum of squares about the mean
  double least = INF, most = -INF, dot = 0;

  void add(const Found& other) {
    if (other.finite > 0) {
      const double n = finite + other.finite, step = other.mean - mean;
      apart += other.apart + (finite > 0 ? step * step * (finite * other.finite / n) : 0);
      mean += finite > 0 ? step * (other.finite / n) : step;
      finite = n;
    }
    squares += other.squares;
    nan += other.nan, posinf += other.posinf, neginf += other.neginf, zero += other.zero, dot += other.dot;
    if (other.least < least) least = other.least;
    if (other.most > most) most = other.most;
  }

  void write(double* parts, double count, bool with_dot) const {
    const bool any = finite > 0;
    parts[COUNT] = count, parts[NAN_] = nan, parts[POSINF] = posinf, parts[NEGINF] = neginf, parts[ZERO] = zero;
    parts[MEAN] = any ? mean : NAN;
    parts[STD] = any ? std::sqrt(apart / finite) : NAN;
    parts[RMS] = any ? std::sqrt(squares / finite) : NAN;
    parts[MIN] = any ? least : NAN;
    parts[MAX] = any ? most : NAN;
    parts[DOT] = with_dot ? dot : NAN;
  }
};

// The same while a chunk is read.
struct Sums : Found {
  double pivot = 0, first = 0, second = 0;  // sums of x - pivot, and of its square
  bool pivoted = false;

  Found close() {
    if (finite > 0) {
      const double shift = first / finite;
      mean = pivot + shift;
      // squares of float64 beyond 1e154 are infinite, and so are their differences here
      const bool held = std::isfinite(second);
      apart = held ? std::fmax(second - shift * first, 0) : INF;
      squares = held ? std::fmax(second + 2 * pivot * first + finite * pivot * pivot, 0) : INF;
    }
    return *this;
  }
};

template <class T> typename Lanes<T>::Int magnitude(T x) {
  typename Lanes<T>::Int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & Lanes<T>::MAGNITUDE;
}

// One element at a time, whatever it is.
template <class T> void read_any(const T* x, int n, Sums& sums) {
  for (int i = 0; i < n; i++) {
    const auto size = magnitude(x[i]);
    if (size >= Lanes<T>::INFINITE) {
      (size > Lanes<T>::INFINITE ? sums.nan : x[i] > 0 ? sums.posinf : sums.neginf) += 1;
      continue;
    }
    const double apart = double(x[i]) - sums.pivot;
    sums.finite += 1, sums.first += apart, sums.second += apart * apart, sums.zero += size == 0;
    if (x[i] < sums.least) sums.least = x[i];
    if (x[i] > sums.most) sums.most = x[i];
  }
}

inline void widen(const Lanes<float>::V& v, Wide& low, Wide& high) {
  Lanes<float>::Narrow half[2];
  std::memcpy(half, &v, sizeof v);
  low = __builtin_convertvector(half[0], Wide);
  high = __builtin_convertvector(half[1], Wide);
}

// Whole vectors, if all are finite; otherwise nothing is added and the answer is false.
template <class T> bool read_finite(const T* x, int n, Sums& sums) {
  typedef Lanes<T> L;
  constexpr int N = L::N;
  typename L::V least = typename L::V{} + T(INF), most = -least;
  typename L::I zero = {}, largest = {};
  const typename L::I mask = typename L::I{} + L::MAGNITUDE;
  const Wide pivot = Wide{} + sums.pivot;
  Wide first = {}, second = {}, first_high = {}, second_high = {};
  for (int i = 0; i < n; i += N) {
    typename L::V v;
    std::memcpy(&v, x + i, sizeof v);
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + AHEAD);
    const typename L::I size = (typename L::I)v & mask;
    zero -= size == 0;
    largest = size > largest ? size : largest;
    least = v < least ? v : least;
    most = v > most ? v : most;
    if constexpr (sizeof(T) == 4) {
      Wide low, high;
      widen(v, low, high);
      low -= pivot, high -= pivot;
      first += low, second += low * low;
      first_high += high, second_high += high * high;
    } else {
      const Wide apart = v - pivot;
      first += apart, second += apart * apart;
    }
  }
  typename L::Int top = 0;
  for (int i = 0; i < N; i++) top = largest[i] > top ? largest[i] : top;
  if (top >= L::INFINITE) return false;
  first += first_high, second += second_high;
  for (int i = 0; i < HALF; i++) sums.first += first[i], sums.second += second[i];
  for (int i = 0; i < N; i++) {
    sums.zero += double(zero[i]);
    if (least[i] < sums.least) sums.least = least[i];
    if (most[i] > sums.most) sums.most = most[i];
  }
  sums.finite += n;
  return true;
}

template <class T> void read_block(const T* x, int n, Sums& sums) {
  if (!sums.pivoted)
    for (int i = 0; i < n && !sums.pivoted; i++)
      if (magnitude(x[i]) < Lanes<T>::INFINITE) sums.pivot = x[i], sums.pivoted = true;
  const int whole = n / Lanes<T>::N * Lanes<T>::N;
  if (whole && !read_finite(x, whole, sums)) read_any(x, whole, sums);
  read_any(x + whole, n - whole, sums);
}

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
  for (int i = 0; i < n; i++) {
    if (type == BFLOAT16) {
      const uint32_t bits = uint32_t(from[i]) << 16;
      std::memcpy(room + i, &bits, sizeof bits);
    } else {
      room[i] = from_half(from[i]);
    }
  }
  return room;
}

void as_doubles(const char* at, int64_t type, int n, double* to) {
  float room[BLOCK];
  if (type == FLOAT64) {
    std::memcpy(to, at, n * sizeof(double));
    return;
  }
  const float* x = as_floats(at, type, n, room);
  for (int i = 0; i < n; i++) to[i] = x[i];
}

void read_typed(const char* at, int64_t type, int n, Sums& sums) {
  float room[BLOCK];
  if (type == FLOAT64)
    read_block(reinterpret_cast<const double*>(at), n, sums);
  else
    read_block(as_floats(at, type, n, room), n, sums);
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
  int64_t start, n;
  Found found, after;
};

void work(Job& job, bool itself) {
  const Row& row = *job.row;
  Sums sums, after;
  double apart[BLOCK], grad[BLOCK], old[BLOCK];
  const int64_t size = SIZE[row.type];
  for (int64_t at = job.start; at < job.start + job.n; at += BLOCK) {
    const int n = int(job.start + job.n - at < BLOCK ? job.start + job.n - at : BLOCK);
    const char* x = reinterpret_cast<const char*>(row.x) + at * size;
    if (row.copy_to) std::memcpy(reinterpret_cast<char*>(row.copy_to) + at * size, x, n * size);
    if (!row.before) {
      read_typed(x, row.type, n, sums);
      continue;
    }
    if (itself) read_typed(x, row.type, n, after);
    as_doubles(x, row.type, n, apart);
    as_doubles(reinterpret_cast<const char*>(row.before) + at * size, row.type, n, old);
    for (int i = 0; i < n; i++) apart[i] -= old[i];
    read_block(apart, n, sums);
    if (row.grad_type >= 0) {
      as_doubles(reinterpret_cast<const char*>(row.grad) + at * SIZE[row.grad_type], row.grad_type, n, grad);
      for (int i = 0; i < n; i++)
        if (std::isfinite(apart[i]) && std::isfinite(grad[i])) sums.dot += apart[i] * grad[i];
    }
  }
  job.found = sums.close();
  job.after = after.close();
}

}  // namespace

// Rows of the table -> float64 [rows, parts]; of rows with `before` also the parts of x itself in `after` (may be null).
extern "C" void paramwatch_measure(const int64_t* table, int64_t rows, double* parts, double* after, int64_t threads) {
  const Row* row = reinterpret_cast<const Row*>(table);
  std::vector<Job> jobs;
  jobs.reserve(rows);
  int64_t total = 0;
  for (int64_t i = 0; i < rows; i++, total += row[i - 1].n)
    for (int64_t start = 0; start < row[i].n; start += CHUNK)
      jobs.push_back({row + i, start, row[i].n - start < CHUNK ? row[i].n - start : CHUNK, {}, {}});
  const int64_t most = total / WORTH_A_THREAD < threads ? total / WORTH_A_THREAD : threads;
  std::atomic<size_t> next{0};
  const auto take = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs.size();) work(jobs[i], after != nullptr);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < most; i++) others.emplace_back(take);
  } catch (const std::system_error&) {  // no more threads to be had: those there are take all
  }
  take();
  for (std::thread& other : others) other.join();
  size_t done = 0;
  for (int64_t i = 0; i < rows; i++) {
    Found found, itself;
    for (; done < jobs.size() && jobs[done].row == row + i; done++) found.add(jobs[done].found), itself.add(jobs[done].after);
    found.write(parts + i * PARTS, double(row[i].n), row[i].grad_type >= 0);
    if (after) itself.write(after + i * PARTS, double(row[i].n), false);
  }
}
