#include "kernels/cuda/rows_scan.cuh"

namespace krait::kernels::cuda {

// Two passes a block share the sums over x_proj's parts and need half the registers, so that blocks begin beside those of
// the kernel in front, where they leave no multiprocessor without one.
void rows_scan(const RowsScan& a, Stream stream) {
  constexpr int64_t kMultiprocessors = 132;
  if (ceil_div(a.e, 192) * ceil_div(a.rows, kScanRows) >= kMultiprocessors * 3 / 4)
    start_rows_scan<384, 2>(a, stream);
  else
    start_rows_scan<384, 1>(a, stream);
}

}  // namespace krait::kernels::cuda
