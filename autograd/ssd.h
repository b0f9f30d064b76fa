#pragma once
#include "autograd/state_passing.h"
#include "autograd/variable.h"
#include "kernels/ssd.h"

namespace krait {
inline namespace autograd {

/// Structured state-space recurrences with matrix states; mathematics and shapes: kernels/ssd.h.
/// final_state (b, heads, p, n) is fp32 (fp64); gradients flow through it and into initial_state.
struct SsdOut { Variable y, final_state; };
struct SsdOptions {
  int64_t chunk = 256;
  Tensor segments = {};  // (b, l) int32
  /// x, B, C, .. are the own piece of a sequence that several members share: the states of the others pass through it,
  /// initial_state (a value, alike on all) enters the first piece, final_state is that of the last.
  SequencePieces pieces = {};
};

/// h_t = e^{a_t} h_{t-1} + x_t (x) B_t, y_t = h_t C_t: x (b, l, heads, p), log decay a (b, l, heads) in fp32 (fp64),
/// B, C (b, l, g, n). With x the values, B the keys and C the queries this is gated linear attention; with a = 0 the
/// plain one.
SsdOut ssd_scan(const Variable& x, const Variable& a, const Variable& B, const Variable& C, int64_t chunk,
                const Variable& initial_state = {}, const Tensor& segments = {}, const SequencePieces& pieces = {});

/// Mamba-2's: dt_t x_t in place of x_t, and D x_t added to y_t. dt, a: fp32 (fp64); D (heads), (heads, p) or undefined.
SsdOut ssd(const Variable& x, const Variable& dt, const Variable& a, const Variable& B, const Variable& C,
           const Variable& D, const Variable& initial_state, const SsdOptions& options = {});

/// The same on xbc (b, l, heads p + 2 g n) = [x, B, C]; y (b, l, heads p). Neither slices nor gradients are copied.
struct SsdSizes { int64_t heads, groups, d_state; };
SsdOut ssd_packed(const Variable& xbc, const Variable& dt, const Variable& a, const Variable& D,
                  const Variable& initial_state, const SsdSizes& sizes, const SsdOptions& options = {});

/// Of a recurrence over the own piece of a sequence, what the other pieces give: for functions that call the kernels
/// themselves. With one piece it changes nothing.
class SsdPiece {
 public:
  /// in.initial_state is that of the whole sequence. Gathers the pieces' states.
  SsdPiece(const kernels::SsdInput& in, const SequencePieces& pieces);
  Tensor before;  // the own piece's initial state
  /// The whole's last state, for the piece's; not kept. Where pieces.last asks for none: that of the own piece.
  Tensor take_last(const Tensor& own_last);
  /// Gradient of the own piece's last state, for that of the whole's. in: with `before` as its initial state.
  Tensor gradient_behind(const kernels::SsdInput& in, const Tensor& dy, const Tensor& dlast) const;
  /// Gradient of the whole's initial state, for the piece's.
  Tensor gradient_before(const Tensor& dinitial) const;

 private:
  SequencePieces pieces_;
  Tensor decays_, last_;
};

/// dt' = softplus(dt + dt_bias) clamped to [low, high], a = -e^{A_log} dt'; both in fp32 (fp64). dt (b, l, heads) in any
/// dtype, dt_bias and A_log (heads). Where the clamp acts the gradient is 0.
struct SsdTimeStep { Variable dt, a; };
SsdTimeStep ssd_time_step(const Variable& dt, const Variable& dt_bias, const Variable& A_log, double low, double high);

}  // namespace autograd
}  // namespace krait
