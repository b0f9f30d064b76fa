#include "kernels/cuda/rows_scan.cuh"

namespace krait::kernels::cuda {

void rows_scan(const RowsScan& a, Stream stream) { start_rows_scan<384, 1>(a, stream); }

}  // namespace krait::kernels::cuda
