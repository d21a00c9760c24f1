// Work that several threads share.

#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Calls `take` in this thread and in others, so many at the most in all; it takes what is left until nothing is.
template <class Take> void in_threads(int64_t most, const Take& take) {
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < most; i++) others.emplace_back(take);
  } catch (const std::system_error&) {  // no more threads to be had: those there are take all
  }
  take();
  for (std::thread& other : others) other.join();
}

}  // namespace
