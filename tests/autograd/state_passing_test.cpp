#include "autograd/state_passing.h"

#include <cmath>

#include "kernels/elementwise.h"
#include "kernels/mlstm.h"
#include "kernels/selective_scan.h"
#include "kernels/ssd.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// A place in a group that nobody else is in: for what needs no communication.
class Place final : public comm::ProcessGroup {
 public:
  Place(int rank, int size) : ProcessGroup(rank, size, "nobody") {}
  comm::Work all_reduce(Tensor, comm::Reduce) override { return {}; }
  comm::Work all_gather(const Tensor&, Tensor) override { return {}; }
  comm::Work reduce_scatter(const Tensor&, Tensor) override { return {}; }
  comm::Work all_to_all(const Tensor&, Tensor) override { return {}; }
  comm::Work broadcast(Tensor, int) override { return {}; }
  comm::Work exchange(const Tensor&, int, Tensor, int) override { return {}; }
  void barrier() override {}
  std::shared_ptr<ProcessGroup> split(int, const std::string&) override { return nullptr; }
};

Tensor bits(const Shape& shape, uint64_t seed) {
  return kernels::greater(random_tensor(shape, Uniform{0, 1}, seed), full(shape, 0.4, DType::f64, kCpu)).to(DType::f64);
}

Tensor documents(int64_t b, int64_t l, int64_t every, Device device) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = 0; t < l; ++t) ids.push_back(static_cast<int32_t>((t + 3 * i) / every));
  return from_vector(ids, {b, l}).to(device);
}

Tensor random_on(Device device, DType dtype, const Shape& shape, uint64_t seed, const Fill& fill = Normal{}) {
  return random_tensor(shape, fill, seed).to(dtype).to(device);
}

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 2e-5 : 2e-2; }

void check_close(const Tensor& a, const Tensor& reference, DType dtype) {
  CHECK(relative_error(a.cpu().to(DType::f64), reference.cpu().to(DType::f64)) < tolerance(dtype));
}

const std::vector<int64_t> kLengths{1, 2, 7, 64, 65, 200};
constexpr int64_t kLong = 1 << 20;  // documents that never end

// The state behind a piece is e^decay times the one before it plus the piece's own; without the final state's gradient,
// that of the initial one is what the outputs send back.
void check_ssd(Device device, DType dtype) {
  const DType sums = accum_dtype(dtype);
  const int64_t b = 2, h = 4, p = 5, g = 2, n = 6;
  for (const int64_t l : kLengths)
    for (const int64_t every : {kLong, int64_t{9}, int64_t{70}}) {
      kernels::SsdInput in;
      in.x = random_on(device, dtype, {b, l, h, p}, 1);
      in.dt = random_on(device, sums, {b, l, h}, 2, Uniform{0.1, 1});
      in.a = random_on(device, sums, {b, l, h}, 3, Uniform{-0.1, 0});
      in.B = random_on(device, dtype, {b, l, g, n}, 4);
      in.C = random_on(device, dtype, {b, l, g, n}, 5);
      in.D = random_on(device, sums, {h}, 6);
      in.chunk = 16;
      if (every != kLong) in.segments = documents(b, l, every, device);
      const Tensor dy = random_on(device, dtype, {b, l, h, p}, 7);
      const kernels::SsdSummary own = kernels::ssd_summary(in);
      check_close(own.state, kernels::ssd_forward(in).final_state, dtype);
      in.initial_state = random_on(device, sums, {b, h, p, n}, 8);
      check_close(kernels::ssd_summary(in).state, kernels::ssd_forward(in).final_state, dtype);
      check_close(kernels::ssd_initial_gradient(dy, in), kernels::ssd_backward(dy, {}, in).dinitial_state, dtype);
      if (in.segments.defined()) continue;
      const Tensor behind = kernels::add(scale_leading(kernels::exp(own.log_decay), in.initial_state), own.state);
      check_close(behind, kernels::ssd_forward(in).final_state, dtype);
    }
}

void check_selective_scan(Device device, DType dtype) {
  const DType sums = accum_dtype(dtype);
  for (const int64_t n : {3, 16, 21})
    for (const int64_t l : kLengths)
      for (const int64_t every : {kLong, int64_t{9}, int64_t{70}}) {
        const int64_t b = 2, e = 37;
        kernels::SelectiveScanInputs in;
        const Tensor xz = random_on(device, dtype, {b, l, 2 * e}, 1);
        in.x = xz.slice(2, 0, e);
        in.z = xz.slice(2, e, 2 * e);
        in.dt = random_on(device, dtype, {b, l, e}, 2, Normal{.mean = -2, .std = 1});
        in.A = random_on(device, sums, {e, n}, 3, Uniform{-2, -0.01});
        in.B = random_on(device, dtype, {b, l, n}, 4);
        in.C = random_on(device, dtype, {b, l, n}, 5);
        in.D = random_on(device, sums, {e}, 6);
        in.dt_bias = random_on(device, sums, {e}, 9);
        if (every != kLong) in.segments = documents(b, l, every, device);
        const Tensor dy = random_on(device, dtype, {b, l, e}, 7);
        const auto own = kernels::selective_scan_summary(in);
        check_close(own.state, kernels::selective_scan_forward(in, false).final_state, dtype);
        in.h0 = random_on(device, sums, {b, e, n}, 8);
        const auto out = kernels::selective_scan_forward(in, true);
        check_close(kernels::selective_scan_summary(in).state, out.final_state, dtype);
        check_close(kernels::selective_scan_initial_gradient(dy, in),
                    kernels::selective_scan_backward(dy, {}, in, out.states).dh0, dtype);
        if (in.segments.defined()) continue;
        const Tensor decay = kernels::exp(kernels::mul(in.A, own.deltas.unsqueeze(-1)));
        check_close(kernels::add(kernels::mul(decay, in.h0), own.state), out.final_state, dtype);
      }
}

void check_mlstm(Device device, DType dtype) {
  const DType sums = accum_dtype(dtype);
  const int64_t b = 2, heads = 3;
  for (const auto& [dq, dv] : {std::pair<int64_t, int64_t>{5, 7}, {16, 24}})
    for (const int64_t l : kLengths)
      for (const int64_t every : {kLong, int64_t{9}, int64_t{70}}) {
        kernels::MlstmInputs in;
        in.q = random_on(device, dtype, {b, l, heads, dq}, 1);
        in.k = random_on(device, dtype, {b, l, heads, dq}, 2);
        in.v = random_on(device, dtype, {b, l, heads, dv}, 3);
        in.i = random_on(device, sums, {b, l, heads}, 4);
        in.f = random_on(device, sums, {b, l, heads}, 5, Normal{.mean = 3, .std = 1});
        if (every != kLong) in.segments = documents(b, l, every, device);
        const kernels::MlstmOptions options{.chunk = 16};
        const Tensor dh = random_on(device, sums, {b, l, heads, dv}, 6);
        const kernels::MlstmSummary own = kernels::mlstm_summary(in, options);
        in.initial = {random_on(device, sums, {b, heads, dq, dv}, 7), random_on(device, sums, {b, heads, dq}, 8),
                      random_on(device, sums, {b, heads}, 9)};
        const kernels::MlstmOut out = kernels::mlstm_forward(in, options);
        const auto gradient = kernels::mlstm_initial_gradient(dh, in, out, options);
        const auto grad = kernels::mlstm_backward({dh, {}, {}}, in, out, options);
        check_close(gradient.dc0, grad.dc0, dtype);
        check_close(gradient.dn0, grad.dn0, dtype);
        Tensor c = own.own.c, n = own.own.n, m = own.own.m;
        if (!in.segments.defined()) {
          const Tensor through = kernels::add(own.log_decay, in.initial.m);
          m = kernels::maximum(through, own.own.m);
          const Tensor keep = kernels::exp(kernels::sub(through, m)), take = kernels::exp(kernels::sub(own.own.m, m));
          c = kernels::add(scale_leading(keep, in.initial.c), scale_leading(take, c));
          n = kernels::add(scale_leading(keep, in.initial.n), scale_leading(take, n));
        } else if (l <= every) {
          continue;  // the first row is one document
        }
        check_close(m, out.last.m, dtype);
        check_close(c, out.last.c, dtype);
        check_close(n, out.last.n, dtype);
      }
}

}  // namespace

TEST_CASE("states pass through the pieces of a sequence as one after the other") {
  const int64_t s = 5, b = 3, h = 2, p = 4;
  const Tensor own = random_tensor({s, b, h, p}, Normal{}, 1), decay = random_tensor({s, b, h}, Uniform{0, 1}, 2);
  const Tensor initial = random_tensor({b, h, p}, Normal{}, 3), gradients = random_tensor({s, b, h, p}, Normal{}, 4);
  for (const bool documents_given : {false, true})
    for (const bool carried : {false, true}) {
      SequencePieces pieces;
      if (documents_given) {
        pieces.whole = bits({s, b}, 5);
        pieces.joined = bits({s, b}, 6);
      }
      const auto flag = [&](const Tensor& t, int64_t r, int64_t row) { return t.defined() ? t.data<double>()[r * b + row] : 1.0; };
      for (int rank = 0; rank < s; ++rank) {
        pieces.group = std::make_shared<Place>(rank, static_cast<int>(s));
        const Tensor decays = cut_decays(decay, pieces);
        const PassedState state = pass_states(own, decays, carried ? initial : Tensor(), pieces);
        const Tensor lambda = pass_gradients(gradients, decays, pieces);
        CHECK(state.before.defined() == (carried || rank > 0));
        CHECK(lambda.defined() == (rank + 1 < s));
        for (int64_t row = 0; row < b; ++row)
          for (int64_t at = 0; at < h * p; ++at) {
            const auto value = [&](const Tensor& t, int64_t r) { return t.data<double>()[(r * b + row) * h * p + at]; };
            const auto kept = [&](int64_t r) { return decay.data<double>()[(r * b + row) * h + at / p] * flag(pieces.whole, r, row); };
            double running = carried ? value(initial, 0) : 0, back = 0;
            for (int64_t r = 0; r < s; ++r) {
              if (r > 0) running *= flag(pieces.joined, r, row);
              if (r == rank && state.before.defined()) CHECK(value(state.before, 0) == Approx(running));
              running = kept(r) * running + value(own, r);
            }
            CHECK(value(state.last, 0) == Approx(running));
            for (int64_t r = s - 1; r > rank; --r) back = flag(pieces.joined, r, row) * (value(gradients, r) + kept(r) * back);
            if (lambda.defined()) CHECK(value(lambda, 0) == Approx(back));
          }
      }
    }
}

TEST_CASE("the scale of states passes with them: unscaled they are those of the plain recurrence") {
  const int64_t s = 4, b = 5;
  const Tensor logs = random_tensor({s, b}, Uniform{-3, 0}, 1), own_m = random_tensor({s, b}, Normal{.std = 2}, 2);
  const Tensor own = random_tensor({s, b}, Normal{}, 3), m0 = random_tensor({b}, Normal{}, 4), c0 = random_tensor({b}, Normal{}, 5);
  SequencePieces pieces;
  pieces.whole = bits({s, b}, 6);
  pieces.joined = bits({s, b}, 7);
  for (int rank = 0; rank < s; ++rank) {
    pieces.group = std::make_shared<Place>(rank, static_cast<int>(s));
    const PassedScale m = pass_scales(logs, own_m, m0, pieces);
    const PassedState c = pass_states(kernels::mul(m.own_scales, own), m.decays, c0, pieces);
    for (int64_t row = 0; row < b; ++row) {
      const auto at = [&](const Tensor& t, int64_t r) { return t.data<double>()[r * b + row]; };
      double plain = at(c0, 0) * std::exp(at(m0, 0));
      for (int64_t r = 0; r < s; ++r) {
        if (r > 0) plain *= at(pieces.joined, r);
        if (r == rank) CHECK(at(c.before, 0) * std::exp(at(m.before, 0)) == Approx(plain));
        plain = std::exp(at(logs, r)) * at(pieces.whole, r) * plain + at(own, r) * std::exp(at(own_m, r));
      }
      CHECK(at(c.last, 0) * std::exp(at(m.last, 0)) == Approx(plain));
    }
  }
}

TEST_CASE("a carried state that several members share refuses a gradient") {
  SequencePieces pieces;
  pieces.group = std::make_shared<Place>(0, 2);
  CHECK(contains(error_of([&] { check_carried("ssd", pieces, Variable(ones({1}, DType::f32, kCpu), true)); }), "detach()"));
  check_carried("ssd", pieces, Variable(ones({1}, DType::f32, kCpu)));
}

TEST_CASE("ssd: a piece from outside is the piece's forward and backward") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) check_ssd(kCpu, dtype);
}
TEST_CASE("selective scan: a piece from outside is the piece's forward and backward") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) check_selective_scan(kCpu, dtype);
}
TEST_CASE("mlstm: a piece from outside is the piece's forward and backward") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) check_mlstm(kCpu, dtype);
}
TEST_CASE("cuda: pieces from outside are the pieces' forward and backward", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    check_ssd(cuda_device(), dtype);
    check_selective_scan(cuda_device(), dtype);
    check_mlstm(cuda_device(), dtype);
  }
}
