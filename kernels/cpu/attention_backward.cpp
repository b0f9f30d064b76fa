#include "core/parallel.h"
#include "kernels/attention.h"
#include "kernels/cpu/attention_unit.h"

namespace krait::kernels::cpu {

namespace {

// Gradients of one (batch, key head), tile by tile. A tile of 64 queries and 64 keys gives S, P, dP and dS, and
// adds its part to dq (64, d) and to dk, dv (64, d); tiles are visited with queries and keys in rising order, so sums
// do not depend on which of the two is the outer loop.
template <class T>
class Unit {
 public:
  using A = accum_t<T>;

  Unit(const Rows<const T>& q, const Rows<const T>& k, const Rows<const T>& v, const Rows<const T>& do_,
       const A* lse, const A* delta, const AttentionMask& mask, const AttentionDropout& dropout, int64_t hq,
       int64_t d, double scale, int64_t extra)
      : q_(q), k_(k), v_(v), do_in_(do_), lse_(lse), delta_(delta), mask_(mask), dropout_(dropout),
        step_(dropout.step ? static_cast<uint64_t>(*dropout.step) : 0), hq_(hq), d_(d),
        dp_(round_up(d, kLanes<A>)), scale_(static_cast<A>(scale)),
        scratch_(8 * kTile * dp_ + 2 * kTile * kTile + extra), kt_(tile()), vt_(tile()), kr_(tile()), own_qr_(tile()),
        own_dor_(tile()), dk_(tile()), dv_(tile()), dq_(tile()), s_(scratch_.take(kTile * kTile)),
        ds_(scratch_.take(kTile * kTile)) {}

  int64_t padded_width() const { return dp_; }
  A* take(int64_t values) { return scratch_.take(values); }
  A* dq() const { return dq_; }

  void begin_keys(int64_t b, int64_t h, int64_t kb) {
    j0_ = kb * kTile;
    const int64_t n = std::min(kTile, mask_.lk - j0_);
    pack_rows<A>(kr_, dp_, v_.at(b, j0_, h), v_.row, n, d_, kTile);
    transpose(vt_, kTile, kr_, dp_, kTile, dp_);
    pack_rows<A>(kr_, dp_, k_.at(b, j0_, h), k_.row, n, d_, kTile);
    transpose(kt_, kTile, kr_, dp_, kTile, dp_);
  }

  /// Packed queries and their gradients of one tile: (64, d) each.
  void pack_queries(A* qr, A* dor, int64_t b, int64_t h, int64_t t) const {
    const int64_t i0 = t * kTile, n = std::min(kTile, mask_.lq - i0), rows = round_up(n, kStrip);
    pack_rows<A>(qr, dp_, q_.at(b, i0, h), q_.row, n, d_, rows);
    pack_rows<A>(dor, dp_, do_in_.at(b, i0, h), do_in_.row, n, d_, rows);
  }

  void begin_queries(int64_t b, int64_t h, int64_t t) {
    pack_queries(own_qr_, own_dor_, b, h, t);
    begin_queries(own_qr_, own_dor_, b, h, t);
  }
  void begin_queries(const A* qr, const A* dor, int64_t b, int64_t h, int64_t t) {
    qr_ = qr;
    dor_ = dor;
    i0_ = t * kTile;
    const int64_t n = std::min(kTile, mask_.lq - i0_);
    rows_ = round_up(n, kStrip);
    first_call_ = dropout_.row(b, h, i0_);
    const int64_t at = (b * hq_ + h) * mask_.lq + i0_;
    for (int64_t r = 0; r < rows_; ++r) {
      row_lse_[r] = r < n ? lse_[at + r] : A{0};
      row_delta_[r] = r < n ? delta_[at + r] : A{0};
    }
  }

  void clear_key_sums() {
    std::fill(dk_, dk_ + kTile * dp_, A{0});
    std::fill(dv_, dv_ + kTile * dp_, A{0});
  }

  /// The tile of the current queries and keys; dq null: for the keys only.
  void tile_gradients(const TileMask& view, A slope, A* dq, bool want_keys) {
    int64_t first[kTile / kStrip], last[kTile / kStrip];
    const int64_t strips = rows_ / kStrip;
    for (int64_t x = 0; x < strips; ++x) {
      const int64_t r0 = x * kStrip;
      const StripView see = view.strip<A>(i0_ + r0, j0_);
      first[x] = see.first;
      last[x] = see.last;
      const int64_t width = see.last - see.first;
      if (width > 0) {
        A* s = s_ + r0 * kTile;
        A* ds = ds_ + r0 * kTile;
        multiply_strip(s + see.first, kTile, qr_ + r0 * dp_, dp_, 1, kt_ + see.first, kTile, width, dp_, false);
        multiply_strip(ds + see.first, kTile, dor_ + r0 * dp_, dp_, 1, vt_ + see.first, kTile, width, dp_, false);
        for (int64_t r = 0; r < kStrip; ++r)
          softmax_row(view, see, r0 + r, slope, s + r * kTile, ds + r * kTile);
        if (dq) multiply_strip(dq + r0 * dp_, dp_, ds + see.first, kTile, 1, kr_ + see.first * dp_, dp_, dp_, width, true);
      }
      if (want_keys && width < kTile) {
        for (int64_t r = r0; r < r0 + kStrip; ++r) {
          for (A* m : {s_ + r * kTile, ds_ + r * kTile}) {
            std::fill(m, m + see.first, A{0});
            std::fill(m + see.last, m + kTile, A{0});
          }
        }
      }
    }
    if (!want_keys) return;
    for (int64_t j = 0; j < kTile; j += kStrip) {
      int64_t x0 = 0, x1 = strips;
      while (x0 < x1 && !(last[x0] > j && first[x0] < j + kStrip)) ++x0;
      while (x1 > x0 && !(last[x1 - 1] > j && first[x1 - 1] < j + kStrip)) --x1;
      if (x0 == x1) continue;
      const int64_t r0 = x0 * kStrip, n = (x1 - x0) * kStrip;
      multiply_strip(dv_ + j * dp_, dp_, s_ + r0 * kTile + j, 1, kTile, dor_ + r0 * dp_, dp_, dp_, n, true);
      multiply_strip(dk_ + j * dp_, dp_, ds_ + r0 * kTile + j, 1, kTile, qr_ + r0 * dp_, dp_, dp_, n, true);
    }
  }

  void write_queries(const Rows<T>& out, int64_t b, int64_t h, int64_t t, const A* dq) const {
    write(out, b, h, t, mask_.lq, dq, scale_);
  }
  void write_keys(const Rows<T>& dk, const Rows<T>& dv, int64_t b, int64_t h, int64_t kb) const {
    write(dk, b, h, kb, mask_.lk, dk_, scale_);
    write(dv, b, h, kb, mask_.lk, dv_, A{1});
  }

 private:
  A* tile() { return scratch_.take(kTile * dp_); }

  // Row r of the tile. s: scores to m P; ds: do v^T to dS (without the scale, which dq and dk get at the end).
  void softmax_row(const TileMask& view, const StripView& see, int64_t r, A slope, A* s, A* ds) const {
    if (!dropout_.step) return gradient_row(view, see, r, slope, s, ds);
    alignas(64) A keep[kTile];
    const uint64_t call = first_call_ + static_cast<uint64_t>(r * dropout_.row_calls + j0_ / 4);
    keep_row(keep, dropout_, call, step_);
    const A factor = static_cast<A>(dropout_.keep_scale);
    multiply_row(ds + see.first, keep + see.first, see.last - see.first, factor);
    gradient_row(view, see, r, slope, s, ds);
    multiply_row(s + see.first, keep + see.first, see.last - see.first, factor);
  }

  // s: scores to P; ds: dP to dS.
  void gradient_row(const TileMask& view, const StripView& see, int64_t r, A slope, A* s, A* ds) const {
    const int64_t n = see.last - see.first;
    const A lse = row_lse_[r], delta = row_delta_[r];
    if (see.partial || slope != 0) {
      for (int64_t j = see.first; j < see.last; ++j) s[j] *= scale_;
      view.apply(s, see, r % kStrip, i0_ + r / kStrip * kStrip, j0_, slope);
      softmax_gradient_row(s + see.first, ds + see.first, n, A{1}, lse, delta);
    } else {
      softmax_gradient_row(s + see.first, ds + see.first, n, scale_, lse, delta);
    }
  }

  void write(const Rows<T>& out, int64_t b, int64_t h, int64_t t, int64_t l, const A* from, A factor) const {
    const int64_t i0 = t * kTile, n = std::min(kTile, l - i0);
    for (int64_t r = 0; r < n; ++r) {
      T* to = out.at(b, i0 + r, h);
      for (int64_t c = 0; c < d_; ++c) to[c] = static_cast<T>(from[r * dp_ + c] * factor);
    }
  }

  const Rows<const T>&q_, &k_, &v_, &do_in_;
  const A *lse_, *delta_;
  AttentionMask mask_;
  AttentionDropout dropout_;
  uint64_t step_, first_call_ = 0;
  int64_t hq_, d_, dp_;
  A scale_;
  Scratch<A> scratch_;
  A *kt_, *vt_, *kr_, *own_qr_, *own_dor_, *dk_, *dv_, *dq_, *s_, *ds_;
  const A *qr_ = nullptr, *dor_ = nullptr;
  A row_lse_[kTile], row_delta_[kTile];
  int64_t i0_ = 0, j0_ = 0, rows_ = 0;
};

template <class T>
void backward(Tensor& dq_, Tensor& dk_, Tensor& dv_, const Tensor& do_t, const Tensor& q_, const Tensor& k_,
              const Tensor& v_, const Tensor& o_, const Tensor& lse, const AttentionOptions& options) {
  using A = accum_t<T>;
  const AttentionMask mask(q_, k_, options);
  const AttentionDropout dropout(q_, k_, options);
  const int64_t b = q_.size(0), lq = mask.lq, lk = mask.lk, hq = q_.size(2), hkv = k_.size(2), d = q_.size(3);
  const int64_t group = hq / hkv, q_tiles = (lq + kTile - 1) / kTile, k_tiles = (lk + kTile - 1) / kTile;
  const Rows<const T> q(q_), k(k_), v(v_), do_(do_t), o(o_);
  const Rows<T> dq(dq_), dk(dk_), dv(dv_);

  const Tensor delta_ = empty({b, hq, lq}, dtype_of<A>, kCpu);  // D_i = do_i . o_i
  A* delta = delta_.data<A>();
  parallel_for(0, b * hq * lq, 1 + 16384 / d, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % lq, h = item / lq % hq, ib = item / (lq * hq);
      delta[item] = dot_row<A>(do_.at(ib, i, h), o.at(ib, i, h), d);
    }
  });
  const auto make_unit = [&](int64_t extra) {
    return Unit<T>(q, k, v, do_, lse.data<A>(), delta, mask, dropout, hq, d, options.scale, extra);
  };
  // Whether the tile may hold a score at all.
  const auto seen = [&](const TileMask& view, int64_t t, int64_t kb) {
    const int64_t i0 = t * kTile, i1 = std::min(lq, i0 + kTile), j0 = kb * kTile, j1 = std::min(lk, j0 + kTile);
    return view.key_begin(i0) < j1 && view.key_end(i1 - 1) > j0 && !view.disjoint(i0, i1, j0, j1);
  };

  if (b * hkv >= 4 * num_threads() || b * hkv % num_threads() == 0) {
    // One pass with q, do and dq of a key head in the workspace: five products a tile.
    parallel_for(0, b * hkv, 1, [&](int64_t begin, int64_t end) {
      const int64_t one = kTile * round_up(d, kLanes<A>), size = group * q_tiles * one;
      Unit<T> unit = make_unit(3 * size);
      A* sums = unit.take(size);
      A* queries = unit.take(size);
      A* gradients = unit.take(size);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t ib = item / hkv, ih = item % hkv;
        const TileMask view(mask, ib);
        std::fill(sums, sums + size, A{0});
        for (int64_t x = 0; x < group * q_tiles; ++x)
          unit.pack_queries(queries + x * one, gradients + x * one, ib, ih * group + x / q_tiles, x % q_tiles);
        for (int64_t kb = 0; kb < k_tiles; ++kb) {
          unit.begin_keys(ib, ih, kb);
          unit.clear_key_sums();
          for (int64_t g = 0; g < group; ++g) {
            const A slope = static_cast<A>(view.slope(ih * group + g));
            for (int64_t t = 0; t < q_tiles; ++t) {
              if (!seen(view, t, kb)) continue;
              const int64_t at = (g * q_tiles + t) * one;
              unit.begin_queries(queries + at, gradients + at, ib, ih * group + g, t);
              unit.tile_gradients(view, slope, sums + at, true);
            }
          }
          unit.write_keys(dk, dv, ib, ih, kb);
        }
        for (int64_t x = 0; x < group * q_tiles; ++x)
          unit.write_queries(dq, ib, ih * group + x / q_tiles, x % q_tiles, sums + x * one);
      }
    });
    return;
  }
  // Too few heads for the threads: tiles of keys, then tiles of queries. S and dP are made twice.
  const auto folded = [](int64_t x, int64_t n) { return x % 2 ? n - 1 - x / 2 : x / 2; };  // evens out causal work
  parallel_for(0, b * hkv * k_tiles, 1, [&](int64_t begin, int64_t end) {
    Unit<T> unit = make_unit(0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t kb = folded(item % k_tiles, k_tiles), ih = item / k_tiles % hkv, ib = item / (k_tiles * hkv);
      const TileMask view(mask, ib);
      unit.begin_keys(ib, ih, kb);
      unit.clear_key_sums();
      for (int64_t h = ih * group; h < (ih + 1) * group; ++h)
        for (int64_t t = 0; t < q_tiles; ++t) {
          if (!seen(view, t, kb)) continue;
          unit.begin_queries(ib, h, t);
          unit.tile_gradients(view, static_cast<A>(view.slope(h)), nullptr, true);
        }
      unit.write_keys(dk, dv, ib, ih, kb);
    }
  });
  parallel_for(0, b * hq * q_tiles, 1, [&](int64_t begin, int64_t end) {
    Unit<T> unit = make_unit(0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = folded(item % q_tiles, q_tiles), h = item / q_tiles % hq, ib = item / (q_tiles * hq);
      const TileMask view(mask, ib);
      unit.begin_queries(ib, h, t);
      std::fill(unit.dq(), unit.dq() + kTile * unit.padded_width(), A{0});
      for (int64_t kb = 0; kb < k_tiles; ++kb) {
        if (!seen(view, t, kb)) continue;
        unit.begin_keys(ib, h / group, kb);
        unit.tile_gradients(view, static_cast<A>(view.slope(h)), unit.dq(), false);
      }
      unit.write_queries(dq, ib, h, t, unit.dq());
    }
  });
}

}  // namespace

void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options) {
  visit_float(q.dtype(), [&]<class T>() { backward<T>(dq, dk, dv, do_, q, k, v, o, lse, options); });
}

}  // namespace krait::kernels::cpu
