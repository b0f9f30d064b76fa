#pragma once
// What the mLSTM kernels for CUDA share. A chunk is 256 positions with wgmma, 128 on other tensor cores, 64 elsewhere; a unit is one
// (batch entry, head); per-position arrays are (unit, l), per-chunk arrays (unit, chunk).
//
// Forward: gates, the state before every chunk (one pass over the chunks for each tile of a state, in registers),
// then all chunks at once. Backward: the same states again, the gradients of the state behind every chunk in a pass
// from the end, then all chunks at once for dq, dk and dv.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/attention_common.cuh"
#include "kernels/mlstm.h"

namespace krait::kernels::cuda {

inline constexpr int kChunk = 64, kMmaChunk = 128, kWgmmaChunk = 256;  // on CUDA cores, on tensor cores, with wgmma
inline constexpr int kWgmmaSide = 192;  // of the square of a state that a block carries on wgmma

struct MlstmShape {
  int64_t l, heads, units, chunks;
  int dq, dv, chunk;
  bool mma, wgmma;  // on tensor cores; states and coefficients on those of sm_90a
  MlstmShape(const MlstmInputs& in, bool on_tensor_cores, bool states_on_wgmma)
      : l(in.q.size(1)), heads(in.q.size(2)), units(in.q.size(0) * heads), dq(static_cast<int>(in.q.size(3))),
        dv(static_cast<int>(in.v.size(3))), chunk(states_on_wgmma ? kWgmmaChunk : on_tensor_cores ? kMmaChunk : kChunk),
        mma(on_tensor_cores), wgmma(states_on_wgmma) {
    chunks = ceil_div(l, chunk);
  }
};

/// Names as in kernels/mlstm.h; t and j count from the chunk's start.
template <class A>
struct MlstmGates {
  A *c, *u;
  A* inter;    // e^(m before the chunk - u_t), 0 where the document began inside the chunk
  A* w;        // weight of position j in the state behind the chunk
  A* decay;    // of the state before it there
  int* first;  // where the document begins in the chunk; -1: before it
  A* wc;       // weight of C^T q in h; of q dh^T in the gradient of C
  // Backward only.
  A *inverse, *dr;  // 1 / den and dr
  A* wn;            // weight of q in the gradient of n
};

/// What the state carried from chunk to chunk is made of: C += wc a b^T, n += wn a.
template <class T>
struct MlstmStateJob {
  using A = accum_t<T>;
  T* states;  // (unit, chunk, dq, dv): before the chunk; going backwards, behind it
  A* n_states;
  Strided<const T> a, b;
  const A *wc, *wn, *decay;
  const A *c_begin, *n_begin;  // null: zero
  A *c_end, *n_end;            // null: not wanted
  bool reverse;
  // Going backwards: <dC, C> + <dn, n> behind the chunk in partial sums (unit, chunk, flow_parts of the shape).
  A* flow;
  const T* forward_states;
  const A *forward_n, *c_last, *n_last;
  MlstmShape shape;
  int64_t tiles;  // of a state, those of dv fastest
  int tile;       // their side
};

/// Products of one chunk: out_i = row_i State + sum_k coefficient(row_i . col_k) value_k.
enum class Mix {
  read,  // h:  rows q, columns k, values v; State C
  dv,    // dv: rows k, columns q, values dh; State dC
  dq,    // dq: rows dh, columns v, values k; State C^T
  dk     // dk: rows v, columns dh, values q; State dC^T
};
inline constexpr bool is_turned(Mix m) { return m == Mix::dq || m == Mix::dk; }
inline constexpr bool rows_are_keys(Mix m) { return m == Mix::dv || m == Mix::dk; }

template <class T>
struct MlstmMixJob {
  using A = accum_t<T>;
  A* h;            // read: (b, l, heads, dv); with wgmma null where it is wanted in `out`
  T* out;          // the others: (b, l, heads, width)
  Strided<const T> rows, columns, values;
  const T* states;
  const A* n_states;
  MlstmGates<A> gates;
  A scale, eps;
  const A* m;            // read
  A* r;                  // read
  Strided<const T> own;  // dq, dk: q and k, whose products with the result the gates need
  A* dots;               // (unit, l, dot_parts)
  MlstmShape shape;
  int64_t tiles;  // of the result's width
  T* coefficients;  // tensor cores: (unit, chunk, positions, keys), keys at least up to the end of the position's 64
};

/// e^(c_j - u_t) where t sees j.
template <class A>
__device__ inline A seen_weight(A c, A u, int first, int j, int t) {
  return j <= t && j >= first ? exp_of(c - u) : A{0};
}

template <class A>
__device__ inline A mlstm_denominator(A r, A m, A eps) {
  const A floor_ = exp_of(-(m > A{-80} ? m : A{-80})), top = r < 0 ? -r : r;
  return (top > floor_ ? top : floor_) + eps;
}

// bf16 on tensor cores: rows 16-byte aligned, widths multiples of 8.
bool mlstm_mma_serves(const Tensor& t);
void mlstm_states_mma(const MlstmStateJob<bf16>& job, Stream stream);
/// Makes the coefficients: those of read (with r and the denominator: wc as well), of dv, or of dq, which are dk's too.
void mlstm_coefficients_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream);
/// With coefficients.
void mlstm_mix_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream);
/// The same states where dq and dv are multiples of kWgmmaSide, on sm_90a.
bool mlstm_wgmma_serves(Device device, int64_t dq, int64_t dv);
void mlstm_states_wgmma(const MlstmStateJob<bf16>& job, Stream stream);
void mlstm_coefficients_wgmma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream);
void mlstm_mix_wgmma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream);
// Anything else.
template <class T> void mlstm_states_simt(const MlstmStateJob<T>& job, Stream stream);
template <class T> void mlstm_mix_simt(Mix mix, const MlstmMixJob<T>& job, Stream stream);

/// Columns of a result that one block makes.
inline int64_t mlstm_tile_width(const MlstmShape& s, int64_t width) {
  if (s.wgmma) return width % 384 == 0 ? 384 : 192;
  return s.mma && width > 64 ? 128 : 64;
}
inline int64_t mlstm_tiles(const MlstmShape& s, int64_t width) { return ceil_div(width, mlstm_tile_width(s, width)); }
inline int64_t dot_parts(const MlstmShape& s) { return mlstm_tiles(s, s.dq) * (s.mma && !s.wgmma ? 2 : 1); }
/// A block of the state kernels has a square of C with this side: large ones read a and b less often, but there must be
/// enough of them.
inline int mlstm_state_tile(const MlstmShape& s) {
  if (!s.mma) return 64;
  if (s.wgmma) return kWgmmaSide;
  const auto blocks = [&](int64_t tile) { return s.units * ceil_div(s.dq, tile) * ceil_div(s.dv, tile); };
  if (s.dq % 192 == 0 && s.dv % 192 == 0 && blocks(192) >= 96) return 192;
  return s.dq > 64 && s.dv > 64 && blocks(128) >= 96 ? 128 : 64;
}
inline int64_t state_tiles(const MlstmShape& s) {
  const int64_t tile = mlstm_state_tile(s);
  return ceil_div(s.dq, tile) * ceil_div(s.dv, tile);
}
inline int64_t flow_parts(const MlstmShape& s) { return state_tiles(s) * (s.wgmma ? 12 : s.mma ? 8 : 1); }

}  // namespace krait::kernels::cuda
