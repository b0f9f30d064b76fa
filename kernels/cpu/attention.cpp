#include "kernels/attention.h"

#include <cmath>

#include "core/parallel.h"
#include "kernels/cpu/attention_unit.h"

namespace krait::kernels::cpu {

namespace {

// How a call is cut for the threads. Results do not depend on it: every tile and every sum over tiles is the same.
struct Cut {
  int64_t units, parts;  // units (batch, key head), each cut into parts of query tiles
  Cut(int64_t n, int64_t tiles) : units(n), parts(1) {
    const int64_t threads = num_threads();
    if (n < 4 * threads && n % threads != 0) parts = std::min(tiles, (4 * threads + n - 1) / n);
  }
};

// Keys of one head for the forward: transposed tile by tile, and values in rows. Tiles start at key tile `first`.
template <class T, class A>
void pack_keys(A* kt, A* vr, A* rows, const Rows<const T>& k, const Rows<const T>& v, int64_t b, int64_t h, int64_t d,
               int64_t dp, int64_t first, int64_t last, int64_t lk) {
  for (int64_t t = first; t < last; ++t) {
    const int64_t j0 = t * kTile, n = std::min(kTile, lk - j0), at = (t - first) * kTile * dp;
    pack_rows<A>(rows, dp, k.at(b, j0, h), k.row, n, d, kTile);
    transpose(kt + at, kTile, rows, dp, kTile, dp);
    pack_rows<A>(vr + at, dp, v.at(b, j0, h), v.row, n, d, kTile);
  }
}

template <class T>
void forward(Tensor& o, Tensor& lse, const Tensor& q_, const Tensor& k_, const Tensor& v_,
             const AttentionOptions& options) {
  using A = accum_t<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const AttentionMask mask(q_, k_, options);
  const int64_t b = q_.size(0), lq = mask.lq, lk = mask.lk, hq = q_.size(2), hkv = k_.size(2), d = q_.size(3);
  const int64_t group = hq / hkv, dp = round_up(d, kLanes<A>), tiles = (lq + kTile - 1) / kTile;
  const Rows<const T> q(q_), k(k_), v(v_);
  const Rows<T> out(o);
  A* lse_ = lse.data<A>();
  const A scale = static_cast<A>(options.scale);
  const AttentionDropout dropout(q_, k_, options);
  const uint64_t now_step = dropout.step ? static_cast<uint64_t>(*dropout.step) : 0;
  const A keep_scale = static_cast<A>(dropout.keep_scale);  // applied at the end, with 1 / l
  const Cut cut(b * hkv, tiles);

  parallel_for(0, cut.units * cut.parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t key_tiles = (lk + kTile - 1) / kTile;
    Scratch<A> scratch(2 * key_tiles * kTile * dp + 3 * kTile * dp + kStrip * kTile + 2 * kTile);
    A* kt = scratch.take(key_tiles * kTile * dp);
    A* vr = scratch.take(key_tiles * kTile * dp);
    A* rows = scratch.take(kTile * dp);
    A* qt = scratch.take(kTile * dp);
    A* acc = scratch.take(kTile * dp);
    A* s = scratch.take(kStrip * kTile);
    A* peak = scratch.take(kTile);
    Vec<A> sum[kTile];
    alignas(64) A keep[kTile];

    for (int64_t item = begin; item < end; ++item) {
      const int64_t unit = item / cut.parts, part = item % cut.parts, ib = unit / hkv, ih = unit % hkv;
      const TileMask view(mask, ib);
      // Parts take every parts-th tile, so that causal work is even.
      int64_t first = key_tiles, last = 0;
      for (int64_t t = part; t < tiles; t += cut.parts) {
        const int64_t i0 = t * kTile, i1 = std::min(lq, i0 + kTile) - 1;
        first = std::min(first, view.key_begin(i0) / kTile);
        last = std::max(last, (view.key_end(i1) + kTile - 1) / kTile);
      }
      first = std::min(first, last);
      pack_keys<T, A>(kt, vr, rows, k, v, ib, ih, d, dp, first, last, lk);

      for (int64_t h = ih * group; h < (ih + 1) * group; ++h) {
        const A slope = static_cast<A>(view.slope(h));
        for (int64_t t = part; t < tiles; t += cut.parts) {
          const int64_t i0 = t * kTile, n = std::min(kTile, lq - i0), padded = round_up(n, kStrip);
          pack_rows<A>(qt, dp, q.at(ib, i0, h), q.row, n, d, padded, scale);
          std::fill(acc, acc + padded * dp, A{0});
          std::fill(peak, peak + padded, kNone);
          std::fill(sum, sum + padded, Vec<A>{});
          const int64_t t0 = view.key_begin(i0) / kTile, t1 = (view.key_end(i0 + n - 1) + kTile - 1) / kTile;
          for (int64_t kb = t0; kb < t1; ++kb) {
            const int64_t j0 = kb * kTile, at = (kb - first) * kTile * dp;
            if (view.disjoint(i0, i0 + n, j0, std::min(lk, j0 + kTile))) continue;
            for (int64_t r0 = 0; r0 < padded; r0 += kStrip) {
              const StripView see = view.strip<A>(i0 + r0, j0);
              if (see.first >= see.last) continue;
              const int64_t width = see.last - see.first;
              multiply_strip(s + see.first, kTile, qt + r0 * dp, dp, 1, kt + at + see.first, kTile, width, dp, false);
              for (int64_t r = 0; r < kStrip; ++r) {
                A* row = s + r * kTile;
                if (see.partial || slope != 0) view.apply(row, see, r, i0 + r0, j0, slope);
                Vec<A> top = load(row + see.first);
                for (int64_t j = see.first + kLanes<A>; j < see.last; j += kLanes<A>) {
                  const Vec<A> x = load(row + j);
                  top = x > top ? x : top;
                }
                const A before = peak[r0 + r], now = std::max(before, largest<A>(top));
                if (now == kNone) {
                  std::fill(row + see.first, row + see.last, A{0});
                  continue;
                }
                if (now > before) {
                  const A shrink = before == kNone ? A{0} : vexp(before - now);
                  peak[r0 + r] = now;
                  sum[r0 + r] *= shrink;
                  A* to = acc + (r0 + r) * dp;
                  for (int64_t c = 0; c < dp; c += kLanes<A>) store<A>(to + c, load(to + c) * shrink);
                }
                sum[r0 + r] += exp_row(row + see.first, width, now);
                if (dropout.step) {
                  keep_row(keep, dropout, dropout.row(ib, h, i0 + r0 + r) + static_cast<uint64_t>(j0 / 4), now_step);
                  multiply_row(row + see.first, keep + see.first, width, A{1});
                }
              }
              multiply_strip(acc + r0 * dp, dp, s + see.first, kTile, 1, vr + at + see.first * dp, dp, dp, width, true);
            }
          }
          for (int64_t r = 0; r < n; ++r) {
            const A l = total<A>(sum[r]), inverse = l > 0 ? keep_scale / l : A{0};
            T* to = out.at(ib, i0 + r, h);
            for (int64_t c = 0; c < d; ++c) to[c] = static_cast<T>(acc[r * dp + c] * inverse);
            lse_[(ib * hq + h) * lq + i0 + r] = l > 0 ? peak[r] + std::log(l) : kNone;
          }
        }
      }
    }
  });
}

// Few queries (generation, so no dropout): rows of scores by dot products, each key and value read once per query head.
template <class T>
void forward_few(Tensor& o, Tensor& lse, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                 const AttentionOptions& options) {
  using A = accum_t<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const AttentionMask mask(q_, k_, options);
  const int64_t b = q_.size(0), lq = mask.lq, hq = q_.size(2), group = hq / k_.size(2), d = q_.size(3);
  const Rows<const T> q(q_), k(k_), v(v_);
  const Rows<T> out(o);
  const int64_t work = d * mask.lk;
  parallel_for(0, b * hq * lq, std::max<int64_t>(1, 65536 / (work + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % lq, h = item / lq % hq, ib = item / (lq * hq);
      const TileMask view(mask, ib);
      const A slope = static_cast<A>(view.slope(h));
      const T* query = q.at(ib, i, h);
      A acc[256] = {}, s[kTile], peak = kNone, sum = 0;
      for (int64_t j0 = view.key_begin(i); j0 < view.key_end(i); j0 += kTile) {
        const int64_t n = std::min(kTile, view.key_end(i) - j0);
        A now = peak;
        for (int64_t j = 0; j < n; ++j) {
          const T* key = k.at(ib, j0 + j, h / group);
          A dot = dot_row<A>(query, key, d) * static_cast<A>(options.scale);
          if (slope != 0) dot -= slope * static_cast<A>(std::abs(mask.position(ib, i) - j0 - j));
          if (mask.q_segments && mask.q_segments[ib * lq + i] != mask.k_segments[ib * mask.lk + j0 + j]) dot = kNone;
          s[j] = dot;
          now = std::max(now, dot);
        }
        if (now == kNone) continue;
        const A shrink = peak == kNone ? A{0} : vexp(peak - now);
        peak = now;
        sum *= shrink;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) acc[c] *= shrink;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] = vexp(s[j] - now);
        for (int64_t j = 0; j < n; ++j) {
          const T* value = v.at(ib, j0 + j, h / group);
          const A p = s[j];
          sum += p;
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) acc[c] += p * static_cast<A>(value[c]);
        }
      }
      T* to = out.at(ib, i, h);
      for (int64_t c = 0; c < d; ++c) to[c] = static_cast<T>(sum > 0 ? acc[c] / sum : A{0});
      lse.data<A>()[(ib * hq + h) * lq + i] = sum > 0 ? peak + std::log(sum) : kNone;
    }
  });
}

}  // namespace

void attention_forward(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const AttentionOptions& options) {
  visit_float(q.dtype(), [&]<class T>() {
    if (q.size(1) <= 2 && options.dropout.p == 0)  // generation
      forward_few<T>(o, lse, q, k, v, options);
    else
      forward<T>(o, lse, q, k, v, options);
  });
}

void attention_kernel_name(std::string& name, const Tensor& q, const Tensor&, const Tensor&,
                           const AttentionOptions& options) {
  name = fmt::format("blockwise, {}-byte vectors, {}", kVectorBytes, q.dtype());
  if (options.dropout.p > 0) name += fmt::format(", dropout {}", options.dropout.p);
}

}  // namespace krait::kernels::cpu
