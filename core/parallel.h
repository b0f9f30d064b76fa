#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace krait {
inline namespace core {

/// Threads that parallel_for and the BLAS use. n < 1 restores the default: the processors this process may
/// run on, or OMP_NUM_THREADS.
void set_num_threads(int n);
int num_threads();

/// Whether the calling thread runs a piece of parallel work: what it starts runs inline.
bool in_parallel();

/// f(work, piece, thread) for pieces 0 .. pieces - 1, each once, by the caller and the threads it wakes; thread numbers lie in
/// [0, num_threads()). Each thread begins with its own contiguous share of the pieces and then helps the others, and the
/// caller waits for pieces that others have begun, never for threads that have not: who else uses the processors delays
/// a piece, not everybody. One caller at a time; another one's pieces, and nested ones, run inline.
/// An exception of a piece is rethrown after all have ended.
using PieceFunction = void (*)(void* work, int64_t piece, int thread);
void run_pieces(int64_t pieces, PieceFunction f, void* work);

template <class F>
void run_pieces(int64_t pieces, F&& f) {
  run_pieces(pieces, [](void* g, int64_t piece, int thread) { (*static_cast<std::remove_reference_t<F>*>(g))(piece, thread); }, &f);
}

/// Into how many pieces `most` units are cut: equal shares for the threads, a few pieces each.
inline int64_t piece_count(int64_t most, int64_t threads) {
  constexpr int64_t kEach = 4;
  return most < threads ? most : threads * std::min(kEach, most / threads);
}

/// Splits [begin, end) into contiguous pieces of about `grain` items or more and calls f(first, last) on each, in
/// parallel. Results that depend on the split (float sums) must not be made with it: use fixed-size chunks.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  const int64_t n = end - begin;
  if (n <= 0) return;
  const int64_t most = (n + grain - 1) / std::max<int64_t>(grain, 1);
  if (most <= 1 || num_threads() <= 1 || in_parallel()) {
    f(begin, end);
    return;
  }
  const int64_t pieces = piece_count(most, num_threads());
  run_pieces(pieces, [&](int64_t p, int) { f(begin + n * p / pieces, begin + n * (p + 1) / pieces); });
}

}  // namespace core
}  // namespace krait
