#include "kernels/attention.h"

#include <cmath>
#include <cstring>

#include "core/allocator.h"
#include "core/parallel.h"
#include "core/stream.h"
#include "tests/testing/tensors.h"

namespace krait {
namespace {

using kernels::AttentionOptions;

struct Inputs {
  Tensor q, k, v, do_;
  Inputs(int64_t b, int64_t lq, int64_t lk, int64_t hq, int64_t hkv, int64_t d, DType dtype, Device device = kCpu)
      : q(random_tensor({b, lq, hq, d}, Normal{}, 1, dtype).to(device)),
        k(random_tensor({b, lk, hkv, d}, Normal{}, 2, dtype).to(device)),
        v(random_tensor({b, lk, hkv, d}, Normal{}, 3, dtype).to(device)),
        do_(random_tensor({b, lq, hq, d}, Normal{}, 4, dtype).to(device)) {}
};

struct All {
  Tensor o, lse, dq, dk, dv;
  All(const Inputs& in, const AttentionOptions& options) {
    auto out = kernels::attention_forward(in.q, in.k, in.v, options);
    o = out.o;
    lse = out.lse;
    auto g = kernels::attention_backward(in.do_, in.q, in.k, in.v, o, lse, options);
    dq = g.dq;
    dk = g.dk;
    dv = g.dv;
  }
  std::vector<Tensor> tensors() const { return {o, lse, dq, dk, dv}; }
};

bool same_bits(const Tensor& a, const Tensor& b) {
  const Tensor x = a.cpu().contiguous(), y = b.cpu().contiguous();
  return x.nbytes() == y.nbytes() && std::memcmp(x.raw_data(), y.raw_data(), static_cast<size_t>(x.nbytes())) == 0;
}

TEST_CASE("attention gives the same bits on any number of threads") {
  const Inputs in(1, 300, 300, 6, 3, 40, DType::f32);
  AttentionOptions options;
  options.window = 130;
  set_num_threads(1);
  const All one(in, options);
  for (const int threads : {2, 5}) {
    set_num_threads(threads);
    const All many(in, options);
    for (size_t i = 0; i < 5; ++i) CHECK(same_bits(one.tensors()[i], many.tensors()[i]));
  }
  set_num_threads(0);
}

TEST_CASE("packed documents equal documents apart") {
  const Inputs in(1, 150, 150, 2, 1, 16, DType::f64);
  std::vector<int32_t> ids(150, 7);
  std::fill(ids.begin() + 61, ids.end(), 3);
  AttentionOptions options;
  options.q_segments = from_vector(ids, {1, 150});
  const All packed(in, options);
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 61}, {61, 150}}) {
    Inputs part = in;
    for (Tensor* t : {&part.q, &part.k, &part.v, &part.do_}) *t = t->slice(1, first, last);
    const All apart(part, {});
    CHECK(relative_error(packed.o.slice(1, first, last), apart.o) < 1e-12);
    CHECK(relative_error(packed.lse.slice(2, first, last), apart.lse) < 1e-12);
    CHECK(relative_error(packed.dq.slice(1, first, last), apart.dq) < 1e-12);
    CHECK(relative_error(packed.dk.slice(1, first, last), apart.dk) < 1e-12);
    CHECK(relative_error(packed.dv.slice(1, first, last), apart.dv) < 1e-12);
  }
}

TEST_CASE("a query without keys gives zeros and lse of minus infinity") {
  for (const int64_t lq : {2, 20}) {
    const Inputs in(1, lq, 6, 2, 2, 8, DType::f32);
    AttentionOptions options;
    options.q_offset = -lq;
    const All out(in, options);
    for (const float x : out.lse.to_vector<float>()) CHECK(x == -INFINITY);
    for (const Tensor& t : {out.o, out.dq, out.dk, out.dv})
      for (const float x : t.to_vector<float>()) CHECK(x == 0.0f);
    const auto none = kernels::attention_forward(in.q, in.k.slice(1, 0, 0), in.v.slice(1, 0, 0));
    for (const float x : none.o.to_vector<float>()) CHECK(x == 0.0f);
    for (const float x : none.lse.to_vector<float>()) CHECK(x == -INFINITY);
  }
}

void check_cache(Device device, double tolerance, DType dtype) {
  const int64_t l = 150, room = 200;
  const Inputs in(2, l, room, 4, 2, 64, dtype, device);
  for (const int64_t window : {0, 33}) {
    AttentionOptions options;
    options.window = window;
    const Tensor k = in.k.slice(1, 0, l), v = in.v.slice(1, 0, l);
    const Tensor whole = kernels::attention_forward(in.q, k, v, options).o;
    for (const int64_t t : {0, 1, 64, 149}) {
      const Tensor length = full({}, static_cast<double>(t + 1), DType::i64, device);
      const Tensor o = kernels::attention_step(in.q.slice(1, t, t + 1), in.k, in.v, length, options);
      CHECK(relative_error(o, whole.slice(1, t, t + 1).contiguous()) < tolerance);
    }
    // A prompt in chunks, lengths per sequence.
    AttentionOptions chunk = options;
    chunk.k_length = full({2}, 100, DType::i32, device);
    const Tensor o = kernels::attention_forward(in.q.slice(1, 80, 100), in.k, in.v, chunk).o;
    CHECK(relative_error(o, whole.slice(1, 80, 100).contiguous()) < tolerance);
  }
}

TEST_CASE("steps against a cache equal attention over the whole sequence") { check_cache(kCpu, 1e-12, DType::f64); }
TEST_CASE("steps against a cache equal the whole sequence on cuda", "[cuda]") {
  if (cuda_device_count() == 0) return;
  check_cache(cuda_device(), 1e-12, DType::f64);
  check_cache(cuda_device(), 1e-5, DType::f32);
  check_cache(cuda_device(), 2e-2, DType::bf16);
}

TEST_CASE("attention names what does not fit") {
  const Tensor q = zeros({2, 5, 4, 8}, DType::f32, kCpu), k = zeros({2, 5, 3, 8}, DType::f32, kCpu);
  CHECK(contains(error_of([&] { kernels::attention_forward(q, k, k); }),
                 "4 query heads are not a multiple of 3 key heads"));
  CHECK(contains(error_of([&] { kernels::attention_forward(q, q, q.slice(3, 0, 4)); }), "(2, 5, 4, 4)"));
  AttentionOptions window;
  window.window = 3;
  window.causal = false;
  CHECK(contains(error_of([&] { kernels::attention_forward(q, q, q, window); }), "window 3 needs causal"));
  AttentionOptions segments;
  segments.q_segments = zeros({2, 4}, DType::i32, kCpu);
  CHECK(contains(error_of([&] { kernels::attention_forward(q, q, q, segments); }), "expected (2, 5)"));
}

// ---- CUDA: whichever kernel serves, against the CPU in fp32 on the same bf16 values.

void check_shape(int64_t b, int64_t l, int64_t hq, int64_t hkv, int64_t d, bool causal) {
  INFO("b " << b << " l " << l << " hq " << hq << " hkv " << hkv << " d " << d << " causal " << causal);
  const Inputs rounded(b, l, l, hq, hkv, d, DType::bf16);
  Inputs exact = rounded, device = rounded;
  for (Tensor* t : {&exact.q, &exact.k, &exact.v, &exact.do_}) *t = t->to(DType::f32);
  for (Tensor* t : {&device.q, &device.k, &device.v, &device.do_}) *t = t->to(cuda_device());
  AttentionOptions options;
  options.causal = causal;
  const All expected(exact, options);
  for (const auto& [vendor, hopper] : {std::pair{true, true}, std::pair{true, false}, std::pair{false, false}}) {
    options.vendor_library = vendor;
    options.hopper_kernel = hopper;
    INFO(kernels::attention_kernel_name(device.q, device.k, device.v, options));
    const All found(device, options), again(device, options);
    for (size_t i = 0; i < 5; ++i) {
      INFO("tensor " << i);
      CHECK(relative_error(found.tensors()[i], expected.tensors()[i]) < (i == 1 ? 1e-3 : 2e-2));
      CHECK(same_bits(found.tensors()[i], again.tensors()[i]));
    }
  }
}

TEST_CASE("cuDNN and the own kernels equal the CPU and repeat bit for bit", "[cuda]") {
  if (cuda_device_count() == 0) return;
  check_shape(2, 1024, 12, 12, 64, true);
  check_shape(1, 256, 4, 4, 128, true);
  check_shape(2, 100, 4, 4, 64, true);
  check_shape(2, 129, 8, 2, 64, true);
  check_shape(1, 2, 2, 1, 64, true);
  check_shape(3, 64, 3, 3, 64, true);
  check_shape(1, 333, 6, 3, 64, false);
  check_shape(12, 449, 14, 14, 64, true);  // more tiles than multiprocessors
  check_shape(1, 200, 4, 1, 128, false);
  check_shape(1, 100, 2, 2, 32, false);
  check_shape(1, 333, 3, 3, 96, true);
  check_shape(1, 77, 2, 2, 40, true);
}

TEST_CASE("a small workspace is used several times, and the results stay", "[cuda]") {
  if (cuda_device_count() == 0) return;
  const int64_t b = 5, l = 256, hq = 12, hkv = 6, of_head = 2 * l * l * 2;  // of a key head
  const Inputs in(b, l, l, hq, hkv, 64, DType::bf16, cuda_device());
  AttentionOptions options;
  options.hopper_kernel = false;
  const All expected(in, options);
  for (const int64_t bytes : {2 * hkv * of_head, hkv * of_head, 4 * of_head, of_head, of_head - 1}) {
    INFO("bytes " << bytes);
    options.vendor_bytes = bytes;
    const All found(in, options), again(in, options);
    for (size_t i = 0; i < 5; ++i) {
      CHECK(relative_error(found.tensors()[i], expected.tensors()[i]) < 1e-2);
      CHECK(same_bits(found.tensors()[i], again.tensors()[i]));
    }
  }
}

TEST_CASE("many long heads of 128: Hopper's kernel equals the one for all options", "[cuda]") {
  if (cuda_device_count() == 0) return;
  struct Shape { int64_t b, lq, lk, hq, hkv; bool causal; };
  for (const auto& [b, lq, lk, hq, hkv, causal] :
       {Shape{3, 2050, 2050, 20, 20, true}, Shape{1, 4100, 4100, 56, 28, true}, Shape{2, 2200, 2070, 28, 28, false}}) {
    INFO("b " << b << " lq " << lq << " hq " << hq << " causal " << causal);
    const Inputs in(b, lq, lk, hq, hkv, 128, DType::bf16, cuda_device());
    AttentionOptions options;
    options.causal = causal;
    const All found(in, options), again(in, options);
    options.vendor_bytes = 2 * hq * ((lq + 63) / 64 * 64) * 128 * 4;  // sums of dq of two sequences
    const All parts(in, options);
    options.hopper_kernel = options.vendor_library = false;
    const All expected(in, options);
    for (size_t i = 2; i < 5; ++i) {
      INFO("tensor " << i);
      CHECK(relative_error(found.tensors()[i], expected.tensors()[i]) < 1e-2);
      CHECK(same_bits(found.tensors()[i], again.tensors()[i]));
      CHECK(relative_error(parts.tensors()[i], expected.tensors()[i]) < 1e-2);
    }
  }
}

TEST_CASE("slices of a fused projection give what separate tensors give on cuda", "[cuda]") {
  if (cuda_device_count() == 0) return;
  const int64_t b = 2, l = 192, hq = 4, hkv = 2, d = 64;
  const Tensor qkv = random_tensor({b, l, hq + 2 * hkv, d}, Normal{}, 9, DType::bf16).to(cuda_device());
  Inputs fused(b, l, l, hq, hkv, d, DType::bf16, cuda_device());
  fused.q = qkv.slice(2, 0, hq);
  fused.k = qkv.slice(2, hq, hq + hkv);
  fused.v = qkv.slice(2, hq + hkv, hq + 2 * hkv);
  Inputs apart = fused;
  for (Tensor* t : {&apart.q, &apart.k, &apart.v}) *t = t->contiguous();
  for (const auto& [vendor, hopper] : {std::pair{true, true}, std::pair{true, false}, std::pair{false, false}}) {
    AttentionOptions options;
    options.vendor_library = vendor;
    options.hopper_kernel = hopper;
    const All x(fused, options), y(apart, options);
    for (size_t i = 0; i < 5; ++i) CHECK(relative_error(x.tensors()[i], y.tensors()[i]) < 1e-2);
    Tensor dqkv = zeros({b, l, hq + 2 * hkv, d}, DType::bf16, cuda_device());
    Tensor dq = dqkv.slice(2, 0, hq), dk = dqkv.slice(2, hq, hq + hkv), dv = dqkv.slice(2, hq + hkv, hq + 2 * hkv);
    kernels::attention_backward_into(dq, dk, dv, fused.do_, fused.q, fused.k, fused.v, x.o, x.lse, options);
    CHECK(relative_error(dq, x.dq) < 1e-2);
    CHECK(relative_error(dk, x.dk) < 1e-2);
    CHECK(relative_error(dv, x.dv) < 1e-2);
  }
}

TEST_CASE("a captured step follows the length of the cache", "[cuda]") {
  if (cuda_device_count() == 0) return;
  const Inputs in(2, 1, 600, 4, 2, 64, DType::bf16, cuda_device());
  Tensor length = full({}, 3, DType::i64, cuda_device());
  MemoryPool pool(cuda_device());
  CapturedGraph graph(cuda_device());
  Tensor o;
  {
    const MemoryPool::Scope scope(pool);
    graph.begin();
    o = kernels::attention_step(in.q, in.k, in.v, length);
    graph.end();
  }
  for (const double n : {1.0, 300.0, 600.0}) {
    fill_(length, n);
    graph.replay();
    const auto l = static_cast<int64_t>(n);
    CHECK(relative_error(o, kernels::attention_forward(in.q, in.k.slice(1, 0, l), in.v.slice(1, 0, l)).o) < 1e-2);
  }
}

TEST_CASE("captured attention gives the bits of attention launched one by one", "[cuda]") {
  if (cuda_device_count() == 0) return;
  const Inputs in(2, 256, 256, 4, 4, 64, DType::bf16, cuda_device());
  for (const bool vendor : {true, false}) {
    AttentionOptions options;
    options.vendor_library = vendor;
    const All eager(in, options);  // also builds plans, which must not happen while recording
    MemoryPool pool(cuda_device());
    CapturedGraph graph(cuda_device());
    std::optional<All> captured;
    {
      const MemoryPool::Scope scope(pool);
      graph.begin();
      captured.emplace(in, options);
      graph.end();
    }
    graph.replay();
    for (size_t i = 0; i < 5; ++i) CHECK(same_bits(captured->tensors()[i], eager.tensors()[i]));
  }
}

}  // namespace
}  // namespace krait
