#include "kernels/cuda/rows_linear.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int64_t kMaxShared = 200 * 1024, kMultiprocessors = 132;

// Calls f with the tile that serves: 16ths of its rows, 8ths of its columns, warps, and pieces of k that a warp holds at a
// time. False when none does.
template <class F>
bool visit_tile(const RowsLinear& a, F f) {
  const bool convolves = a.conv != nullptr, gated = a.units != nullptr;
  const int outputs = a.project != nullptr ? a.outputs : 0;
  const auto whole = [&](int columns) { return outputs == 0 || a.conv_end % columns == 0; };
  // Small blocks, of which two fill a multiprocessor, where all run at once and few of them read the same weights.
  const int64_t small = ceil_div(a.rows, 16) * ceil_div(a.n, 48);
  if (!a.beside && !convolves && a.rows <= 64 && RowsTile<1, 6, 8, 3>::shared_bytes(a.k, convolves, outputs) <= kMaxShared &&
      (gated || small >= kMultiprocessors) && small <= 2 * kMultiprocessors) {
    f.template operator()<1, 6, 8, 3>();
  } else if (RowsTile<2, 6, 8, 3>::shared_bytes(a.k, convolves, outputs) <= kMaxShared && whole(48) &&
      (convolves || gated || ceil_div(a.rows, 32) * ceil_div(a.n, 48) >= kMultiprocessors * 2 / 3)) {
    f.template operator()<2, 6, 8, 3>();
  } else if (convolves || gated) {
    if (RowsTile<2, 4, 8, 4>::shared_bytes(a.k, convolves, outputs) > kMaxShared || !whole(32)) return false;
    f.template operator()<2, 4, 8, 4>();
  } else {
    if (RowsTile<1, 3, 8, 6>::shared_bytes(a.k, convolves, outputs) > kMaxShared) return false;
    f.template operator()<1, 3, 8, 6>();
  }
  return true;
}

constexpr int kScaleWarps = 4;

__global__ void __launch_bounds__(32 * kScaleWarps) scale_rows_kernel(RowScale scale, const bf16* x, int rows, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = int64_t{blockIdx.x} * kScaleWarps + threadIdx.x / 32;
  wait_for_previous();
  let_next_begin();
  if (row >= rows) return;
  const float factor = factor_of_row(scale, row, k);
  for (int c = lane; c < k; c += 32) scale.normed[row * k + c] = static_cast<bf16>(static_cast<float>(x[row * k + c]) * factor);
  if (lane == 0 && scale.rstd != nullptr) scale.rstd[row] = factor;
}

}  // namespace

bool rows_linear_fits(const RowsLinear& a) {
  if (a.rows < 1 || a.k % 32 != 0 || a.n % 2 != 0 || a.x_row % 8 != 0 || a.y_row % 2 != 0 || !aligned16(a.x, a.w)) return false;
  if (a.conv != nullptr && (a.conv_begin % 2 != 0 || a.conv_end % 2 != 0 || !aligned16(a.conv_weight))) return false;
  if (a.units != nullptr && (a.conv != nullptr || a.n % 4 != 0 || a.bias != nullptr || a.residual != nullptr || a.epilogue != Epilogue::none)) return false;
  if (a.project != nullptr && (a.conv_begin != 0 || a.outputs % 2 != 0 || !aligned16(a.project))) return false;
  return visit_tile(a, [&]<int kM, int kN, int kWarps, int kSteps>() {});
}

int projected_columns(const RowsLinear& a) {
  int columns = 0;
  visit_tile(a, [&]<int kM, int kN, int kWarps, int kSteps>() { columns = 8 * kN; });
  return columns;
}

int rows_linear_blocks(const RowsLinear& a) { return static_cast<int>(ceil_div(a.n, projected_columns(a))); }

void rows_linear(const RowsLinear& a, Stream stream) {
  visit_tile(a, [&]<int kM, int kN, int kWarps, int kSteps>() {
    if constexpr (kN >= 4) {
      if constexpr (kM > 1)
        if (a.conv != nullptr) return start_rows_linear<kM, kN, kWarps, kSteps, RowsForm::convolved>(a, stream);
      if (a.units != nullptr) return start_rows_linear<kM, kN, kWarps, kSteps, RowsForm::gated>(a, stream);
    }
    if constexpr (kN != 4) start_rows_linear<kM, kN, kWarps, kSteps, RowsForm::plain>(a, stream);
  });
}

void scale_rows(const RowScale& scale, const bf16* x, int rows, int k, Stream stream) {
  launch_overlapped(scale_rows_kernel, {.grid = ceil_div(rows, kScaleWarps), .block = 32 * kScaleWarps, .stream = stream}, scale, x, rows, k);
}

}  // namespace krait::kernels::cuda
