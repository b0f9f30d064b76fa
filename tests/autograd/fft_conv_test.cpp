#include "autograd/fft_conv.h"

#include "autograd/shape.h"
#include "core/parallel.h"
#include "kernels/fft_conv.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// Documents of uneven lengths, other ones in each row: 1, then growing.
Tensor segments_of(int64_t b, int64_t l, Device device) {
  std::vector<int32_t> s;
  for (int64_t i = 0; i < b; ++i) {
    int64_t left = 1 + i, length = 1 + i;
    int32_t id = 3;
    for (int64_t t = 0; t < l; ++t) {
      s.push_back(id);
      if (--left == 0) {
        ++id;
        left = length = 2 * length + 1;
      }
    }
  }
  return from_vector(s, {b, l}).to(device);
}

enum class Form { causal, with_skip, bidirectional };

// Inputs: u, K, then D, then K1. The kernels stay in the dtype of sums.
Variable run(const Vars& in, bool documents) {
  const DType a = accum_dtype(in[0].dtype());
  const auto at = [&](size_t i) { return in.size() > i ? cast(in[i], a) : Variable(); };
  const Variable& u = in[0];
  return fft_conv(u, at(1), at(2), at(3),
                  documents ? segments_of(u.size(0), u.size(1), u.device()) : Tensor());
}

Variable reference(const Vars& in, bool documents) {
  const Tensor u = in[0].data(), K = in[1].data();
  const int64_t b = u.size(0), l = u.size(1), h = u.size(2), lk = K.size(1);
  const Tensor segments = segments_of(b, l, kCpu);
  Tensor y = zeros_like(u);
  const auto at = [](const Tensor& t, int64_t i, int64_t j) { return t.data<double>()[i * t.size(1) + j]; };
  for (int64_t i = 0; i < b; ++i)
    for (int64_t c = 0; c < h; ++c)
      for (int64_t t = 0; t < l; ++t) {
        double sum = 0;
        for (int64_t s = 0; s < l; ++s) {
          const int32_t* seg = segments.data<int32_t>() + i * l;
          if (documents && seg[s] != seg[t]) continue;
          double w = 0;
          if (s <= t && t - s < lk) w = at(K, c, t - s);
          if (in.size() > 3 && s > t && s - t - 1 < in[3].size(1)) w = at(in[3].data(), c, s - t - 1);
          if (in.size() > 2 && s == t) w += in[2].data().data<double>()[c];
          sum += w * u.data<double>()[(i * l + s) * h + c];
        }
        y.data<double>()[(i * l + t) * h + c] = sum;
      }
  return Variable(y);
}

OpCase make_case(Form form, bool documents) {
  OpCase c;
  c.name = "fft_conv";
  c.run = [=](const Vars& in) { return run(in, documents); };
  c.reference = [=](const Vars& in) { return reference(in, documents); };
  const auto add = [&](int64_t b, int64_t l, int64_t h, int64_t lk, int64_t lk1) {
    std::vector<Shape> shapes{{b, l, h}, {h, lk}};
    if (form != Form::causal) shapes.push_back({h});
    if (form == Form::bidirectional) shapes.push_back({h, lk1});
    c.shapes.push_back(shapes);
  };
  add(1, 1, 1, 1, 1);
  add(2, 2, 3, 2, 2);
  add(3, 7, 5, 7, 6);
  add(2, 33, 17, 20, 40);  // shorter than the sequence, and longer
  add(2, 64, 16, 100, 64);
  add(1, 600, 19, 600, 600);  // more than what the CPU works on level by level
  add(0, 8, 4, 8, 8);
  c.inputs = {Normal{}, Normal{.mean = 3}};
  c.tolerance = {{DType::f32, 1e-5}, {DType::bf16, 2e-2}};
  return c;
}

template <class F>
void for_each_case(F f) {
  for (const Form form : {Form::causal, Form::with_skip, Form::bidirectional})
    for (const bool documents : {false, true}) f(make_case(form, documents));
}

}  // namespace

TEST_CASE("fft_conv is the plain sum over earlier (and later) positions, inside documents") {
  for_each_case([](const OpCase& c) { check_reference(c); });
}

TEST_CASE("fft_conv passes gradcheck") {
  for_each_case([](const OpCase& c) { check_grad(c); });
}

TEST_CASE("fft_conv: cuda equals cpu", "[cuda]") {
  for_each_case([](OpCase c) {
    // Every transform size, those beyond shared memory included.
    for (const int64_t l : {130, 1000, 2049, 5000, 16384, 16385, 40000}) {
      std::vector<Shape> shapes = c.shapes[3];
      shapes[0] = {l > 9000 ? 1 : 3, l, l > 9000 ? 3 : 37};
      for (size_t i = 1; i < shapes.size(); ++i) shapes[i] = shapes[i].with(0, shapes[0][2]);
      shapes[1] = shapes[1].with(1, l);
      c.shapes.push_back(shapes);
    }
    // In registers: whole, just above a smaller transform; more sequences and tiles of channels than blocks at once.
    for (const auto& [b, l, h] : {std::tuple<int64_t, int64_t, int64_t>{2, 1024, 8}, {1, 513, 1}, {3, 520, 530},
                                  {1, 4096, 4}, {2, 2100, 270}}) {
      std::vector<Shape> shapes = c.shapes[3];
      shapes[0] = {b, l, h};
      for (size_t i = 1; i < shapes.size(); ++i) shapes[i] = shapes[i].with(0, h);
      shapes[1] = shapes[1].with(1, l + 400);
      if (shapes.size() > 3) shapes[3] = shapes[3].with(1, l - 1);
      c.shapes.push_back(shapes);
    }
    c.inputs = {Normal{}};
    check_twin(c);
  });
}

TEST_CASE("fft_conv gives the same bits with any number of threads") {
  const Tensor u = random_tensor({5, 70, 40}, Normal{}, 1, DType::f32), dy = random_tensor({5, 70, 40}, Normal{}, 2, DType::f32);
  const Tensor K = random_tensor({40, 70}, Normal{}, 3, DType::f32), D = random_tensor({40}, Normal{}, 4, DType::f32);
  const int before = num_threads();
  const auto all = [&](int threads) {
    set_num_threads(threads);
    const auto g = kernels::fft_conv_backward(dy, u, K, K, D);
    std::vector<float> bits;
    for (const Tensor& t : {kernels::fft_conv_forward(u, K, K, D), g.du, g.dK, g.dK1, g.dD})
      for (const float x : t.to_vector<float>()) bits.push_back(x);
    return bits;
  };
  const auto one = all(1), three = all(3);
  set_num_threads(before);
  CHECK(one == three);
}

TEST_CASE("fft_conv is exact enough over 65536 positions") {
  const int64_t l = 65536;
  const Tensor u = random_tensor({1, l, 2}, Normal{}, 1), K = random_tensor({2, l}, Normal{}, 2);
  const Tensor exact = kernels::fft_conv_forward(u, K);
  CHECK(relative_error(kernels::fft_conv_forward(u.to(DType::f32), K.to(DType::f32)), exact) < 1e-6);
  double sum = 0;  // one position by the definition
  for (int64_t s = 0; s <= 60000; ++s) sum += K.data<double>()[l + 60000 - s] * u.data<double>()[2 * s + 1];
  CHECK(exact.data<double>()[2 * 60000 + 1] == Approx(sum).epsilon(1e-9).margin(1e-9));
}

TEST_CASE("fft_conv says what does not fit") {
  const Tensor u = zeros({2, 4, 3}, DType::f32, kCpu), K = zeros({3, 4}, DType::f32, kCpu);
  const auto message = [](auto f) { return error_of(f); };
  CHECK(contains(message([&] { kernels::fft_conv_forward(u, zeros({2, 4}, DType::f32, kCpu)); }),
                 "fft_conv: K is (2, 4), expected (3, at least 1)"));
  CHECK(contains(message([&] { kernels::fft_conv_forward(u.to(DType::bf16), K.to(DType::bf16)); }),
                 "expected float32 on cpu"));
  CHECK(contains(message([&] { kernels::fft_conv_forward(u, K, {}, zeros({4}, DType::f32, kCpu)); }),
                 "D is (4,), expected (3,)"));
  CHECK(contains(message([&] { kernels::fft_conv_forward(u, K, {}, {}, zeros({2, 3}, DType::i32, kCpu)); }),
                 "segments are"));
}
