#include "kernels/logit_chunk.h"

#include <algorithm>

namespace krait::kernels {

// Large enough that each product is one the hardware runs well and that reading and writing the gradient of w for each
// chunk costs little, small enough that a chunk's logits stay modest. Chunks that fit a GPU's cache would spare the rows'
// kernel the memory, but cost the products more than that. As equal as multiples of 128 can be.
int64_t logit_chunk_rows(int64_t t, int64_t row_bytes, Device device) {
  const int64_t row = std::max<int64_t>(1, row_bytes);
  if (device.is_cpu()) return std::min(t, std::max<int64_t>(192, (int64_t{1} << 20) / row / 96 * 96));  // second-level caches of two cores
  const int64_t most = std::max<int64_t>(128, (int64_t{832} << 20) / row), parts = std::max<int64_t>(1, (t + most - 1) / most);
  return std::min(t, std::max<int64_t>(128, (t + parts * 128 - 1) / (parts * 128) * 128));
}

}  // namespace krait::kernels
