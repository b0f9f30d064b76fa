#include "kernels/cuda/rows_scan.cuh"

namespace krait::kernels::cuda {

RowsScan rows_scan_of(Tensor& y, Tensor& h, const Tensor& mixed, const Tensor& xz, const Tensor& projected, const MambaStepWeights& w) {
  return {y.data<bf16>(), h.data<float>(), mixed.data<bf16>(), xz.data<bf16>(), w.dt_proj.data<bf16>(), projected.data<float>(),
          w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(), static_cast<int>(mixed.size(0)), static_cast<int>(mixed.size(1)),
          static_cast<int>(w.dt_proj.size(1)), static_cast<int>(projected.size(1))};
}

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
