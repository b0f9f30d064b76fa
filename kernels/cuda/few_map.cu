#include "kernels/cuda/few_map.cuh"

#include <algorithm>

#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/packed.cuh"

namespace krait::kernels::cuda {

namespace {

// Calls f with the tile that serves: 8ths of its columns, steps, warps, gated, several rounds, normed. False when none does.
template <class F>
bool visit_tile(const FewMap& a, F f) {
  const bool normed = a.norm_weight != nullptr, few = a.n < 16 * kMultiprocessors, many = a.n > 24 * 2 * kMultiprocessors;
  if (a.k % 32 != 0 || (normed && a.k % 256 != 0)) return false;
  if (a.units != nullptr) {
    if (!normed || a.k > 1024) return false;
    f.template operator()<4, 4, 8, true, false, true>();
  } else if (a.k <= 1024) {
    if (few && normed) f.template operator()<1, 4, 8, false, false, true>();
    else if (few) f.template operator()<1, 4, 8, false, false, false>();
    else if (many && a.k <= 768) f.template operator()<3, 3, 8, false, true, true>();
    else if (many) f.template operator()<3, 4, 8, false, true, true>();
    else f.template operator()<3, 4, 8, false, false, true>();
  } else {
    if (a.k > 4096 || normed) return false;
    if (a.k <= 3072) f.template operator()<1, 6, 16, false, false, false>();
    else f.template operator()<1, 8, 16, false, false, false>();
  }
  return true;
}

int64_t blocks_of(const FewMap& a, int columns, bool rounds) {
  const int64_t tiles = ceil_div(a.n, columns);
  return rounds ? std::min(tiles, 2 * kMultiprocessors) : tiles;
}

}  // namespace

bool few_map_fits(const FewMap& a) {
  if (a.rows < 1 || a.rows > kFewRows || a.n < 1 || a.x_row % 8 != 0) return false;
  if (!aligned16(a.x, a.w, a.normed) || !aligned16(a.norm_weight, a.norm_bias)) return false;
  return visit_tile(a, [&]<int kTiles, int kSteps, int kWarps, bool kGated, bool kRounds, bool kNorms>() {});
}

int64_t few_map_choosing_blocks(const FewMap& a) {
  int64_t blocks = 0;
  visit_tile(a, [&]<int kTiles, int kSteps, int kWarps, bool kGated, bool kRounds, bool kNorms>() {
    if (kRounds) blocks = blocks_of(a, 8 * kTiles, true);
  });
  return blocks;
}

void few_map(const FewMap& a, bool early, Stream stream) {
  visit_tile(a, [&]<int kTiles, int kSteps, int kWarps, bool kGated, bool kRounds, bool kNorms>() {
    const auto kernel = few_map_kernel<kTiles, kSteps, kWarps, kGated, kRounds, kNorms, NothingBehind>;
    keep_shared_memory(kernel);
    launch_overlapped(kernel, {.grid = blocks_of(a, kGated ? 4 * kTiles : 8 * kTiles, kRounds), .block = 32 * kWarps,
                               .shared = a.norm_weight != nullptr ? int64_t{8} * a.k : 0, .stream = stream},
                      a, early, NothingBehind{});
  });
}

}  // namespace krait::kernels::cuda
