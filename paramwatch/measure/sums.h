// What is known of some elements while they are read, how that folds, and the parts that follow from it.

#pragma once

#include <cmath>

namespace {

constexpr double INF = INFINITY;

// In the order of `columns.PARTS`.
enum Part { COUNT, NAN_, POSINF, NEGINF, ZERO, MEAN, STD, RMS, MIN, MAX, DOT, PARTS };

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
    // an extreme of 0 has no sign: lanes meet the zeros in another order than chunks do
    parts[MIN] = any ? least + 0.0 : NAN;
    parts[MAX] = any ? most + 0.0 : NAN;
    parts[DOT] = with_dot ? dot : NAN;
  }
};

// The same while a chunk is read.
struct Sums : Found {
  double pivot = 0, first = 0, second = 0;  // sums of x - pivot, and of its square
  bool pivoted = false;

  // No more elements come: what folds follows.
  void close() {
    if (!(finite > 0)) return;
    const double shift = first / finite;
    mean = pivot + shift;
    // squares of float64 beyond 1e154 are infinite, and so are their differences here
    const bool held = std::isfinite(second);
    apart = held ? above_zero(second - shift * first) : INF;
    squares = held ? above_zero(second + 2 * pivot * first + finite * pivot * pivot) : INF;
  }

  static double above_zero(double x) { return x > 0 ? x : 0; }
};

}  // namespace
