#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// The selective scan of Mamba. x, dt, z (b, l, e); B, C (b, l, n); A (e, n), D and dt_bias (e), h0 (b, e, n), the last
/// four in fp32 (fp64 in fp64). D, z, dt_bias, h0 and segments may be undefined; dt is before the softplus.
/// Mathematics: kernels/selective_scan.h.
struct SelectiveScanArguments {
  Variable x, dt, A, B, C;
  Variable D = {}, z = {}, dt_bias = {}, h0 = {};
  Tensor segments = {};
  bool softplus = true;
};
/// y (b, l, e) like x, and the state after the last position (b, e, n).
struct ScanOut { Variable y, final_state; };
ScanOut selective_scan(const SelectiveScanArguments& in);

}  // namespace autograd
}  // namespace krait
