#include "kernels/cpu/ssd_chunk.h"

namespace krait::kernels::cpu {

namespace ssd {

// What each chunk's outputs send to the state before it, sum_i e^{s_i} C_i (x) dy_i, in parallel; then a pass from the
// end over the chunks of every head.
template <class T>
StateGradients<T>::StateGradients(const SsdInput& in, const Tensor& dy_in, const Tensor& dfinal, Tensor* dinitial) {
  const Sizes<A> z(in);
  behind = empty(z.states(), dtype_of<A>, kCpu);
  const Tensor totals = empty({z.b, z.chunks, z.heads}, dtype_of<A>, kCpu);
  const View<const T> dy(dy_in), C(in.C);
  A *gradients = behind.data<A>(), *total = totals.data<A>();
  const A* a = in.a.data<A>();
  const int32_t* segments = in.segments.defined() ? in.segments.data<int32_t>() : nullptr;

  const auto scratch = [&] { return OuterScratch<A>(z); };
  for_each_unit<A>(z, scratch, [&](OuterScratch<A>& s, int64_t b, int64_t c, int64_t g, int64_t t0, int64_t q) {
    pack_rows<A>(s.rows, z.np, C.at(b, t0, g), C.row, q, z.n, z.qp);
    for (int64_t h = g * z.group; h < (g + 1) * z.group; ++h) {
      const int64_t unit = (b * z.chunks + c) * z.heads + h;
      s.decay.fill(a + (b * z.l + t0) * z.heads + h, z.heads, segments ? segments + b * z.l + t0 : nullptr, t0 == 0, q);
      pack_rows<A>(s.others, z.pp, dy.at(b, t0, h), dy.row, q, z.p, z.qp);
      scale_rows(s.others, s.others, s.decay.in, q, z.pp);
      outer_sum(gradients + unit * z.state(), s.rows, s.others, q, z);
      total[unit] = s.decay.total;
    }
  });

  carry_over_chunks(gradients, total, dfinal, dinitial, true, z);
}

template struct StateGradients<float>;
template struct StateGradients<double>;
template struct StateGradients<bf16>;

}  // namespace ssd

void ssd_final_state(Tensor& state, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() { ssd::States<T>(in, &state); });
}

void ssd_initial_gradient(Tensor& gradient, const Tensor& dy, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() { ssd::StateGradients<T>(in, dy, {}, &gradient); });
}

}  // namespace krait::kernels::cpu
