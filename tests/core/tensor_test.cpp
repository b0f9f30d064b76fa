#include "core/tensor.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "core/allocator.h"
#include "core/parallel.h"
#include "core/stream.h"
#include "tests/testing/tensors.h"

using namespace krait;

namespace {
// 0, 1, 2, ... in a shape.
Tensor count(const Shape& shape, DType dtype = DType::f32) {
  return arange(shape.numel(), dtype, kCpu).view(shape);
}
using V = std::vector<int64_t>;
V values(const Tensor& t) { return t.to_vector<int64_t>(); }

constexpr DType kAllDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32, DType::i64, DType::u8, DType::boolean};
std::string bits(const Tensor& t) {
  const Tensor here = t.cpu();
  return {static_cast<const char*>(here.raw_data()), static_cast<size_t>(here.nbytes())};
}
}  // namespace

TEST_CASE("views share storage and see each other's writes") {
  Tensor x = count({2, 3});
  Tensor row = x.select(0, 1), column = x.slice(1, 1, 2), t = x.transpose(0, 1);
  CHECK(values(row) == V{3, 4, 5});
  CHECK(values(column) == V{1, 4});
  CHECK(values(t) == V{0, 3, 1, 4, 2, 5});
  CHECK(t.storage() == x.storage());
  fill_(column, 9);
  CHECK(values(x) == V{0, 9, 2, 3, 9, 5});
  CHECK(values(t.select(0, -2)) == V{9, 9});
}

TEST_CASE("permute, unsqueeze, squeeze and expand") {
  const Tensor x = count({2, 3, 4});
  const Tensor p = x.permute({2, 0, 1});
  CHECK(p.shape() == Shape{4, 2, 3});
  CHECK(values(p.select(0, 1)) == V{1, 5, 9, 13, 17, 21});
  CHECK(values(p.permute({1, 2, 0})) == values(x));
  CHECK(x.unsqueeze(0).shape() == Shape{1, 2, 3, 4});
  CHECK(x.unsqueeze(-1).shape() == Shape{2, 3, 4, 1});
  CHECK(x.unsqueeze(2).squeeze(2).shape() == x.shape());
  const Tensor e = count({3, 1}).expand({2, 3, 2});
  CHECK(values(e) == V{0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2});
  CHECK(e.strides() == V{0, 1, 0});
  CHECK(!e.is_contiguous());
}

TEST_CASE("contiguity ignores dimensions of one and empty tensors") {
  CHECK(count({2, 3}).is_contiguous());
  CHECK(!count({2, 3}).transpose(0, 1).is_contiguous());
  CHECK(count({1, 3}).transpose(0, 1).is_contiguous());
  CHECK(count({4, 3}).slice(0, 1, 3).is_contiguous());
  CHECK(!count({4, 3}).slice(1, 0, 2).is_contiguous());
  CHECK(count({4, 3}).slice(1, 0, 0).is_contiguous());
  CHECK(count({}).is_contiguous());
}

TEST_CASE("view and reshape agree with a copy over every split of dimensions") {
  const Tensor x = count({4, 6});
  const std::vector<Tensor> sources = {x,
                                       x.transpose(0, 1),
                                       count({8, 6}).slice(0, 2, 6),
                                       count({4, 12}).slice(1, 3, 9),
                                       count({2, 3, 4}).permute({1, 0, 2}),
                                       count({4, 1, 6}),
                                       count({1, 6}).expand({4, 6}),
                                       count({4, 1}).expand({4, 6}),
                                       count({2, 2, 3, 2}).permute({2, 3, 0, 1})};
  const std::vector<Shape> targets = {{24},     {4, 6},       {2, 12},      {12, 2},    {2, 2, 6},  {4, 2, 3},
                                      {4, 3, 2}, {1, 24, 1},  {4, 1, 6, 1}, {2, 2, 3, 2}, {6, 4},   {3, 8},
                                      {8, 3},   {2, 3, 2, 2}, {-1, 3},      {24, 1}};
  for (const Tensor& s : sources)
    for (const Shape& target : targets) {
      const V flat = values(s);
      INFO(s.shape().str() << " as " << target.str());
      CHECK(values(s.reshape(target)) == flat);
      if (s.can_view(target)) {
        CHECK(values(s.view(target)) == flat);
        CHECK(s.view(target).storage() == s.storage());
      } else {
        CHECK(contains(error_of([&] { s.view(target); }), "use reshape"));
      }
    }
  CHECK(count({4, 12}).slice(1, 3, 9).can_view({2, 2, 2, 3}));
  CHECK(!count({4, 12}).slice(1, 3, 9).can_view({24}));
  CHECK(zeros({0, 3}, DType::f32, kCpu).reshape({3, 0}).shape() == Shape{3, 0});
  CHECK(count({2, 3, 4}).flatten_leading(2).shape() == Shape{2, 3, 4});
  CHECK(count({2, 3, 4}).flatten_leading().shape() == Shape{6, 4});
}

TEST_CASE("copies between strides and dtypes keep every value") {
  const DType types[] = {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32, DType::i64, DType::u8};
  const Tensor x = count({5, 3, 7}, DType::f64);  // up to 104: exact everywhere
  for (const DType from : types)
    for (const DType to : types) {
      const Tensor s = strided_copy_of(x.to(from));
      Tensor d = strided_copy_of(zeros(x.shape(), to, kCpu));
      copy_(d, s);
      INFO(name_of(from) << " to " << name_of(to));
      CHECK(values(d) == values(x));
      CHECK(values(x.to(from).to(to)) == values(x));
    }
}

TEST_CASE("long copies are the same on one thread and on many, aligned or not") {
  const Tensor x = random_tensor({300001}, Normal{}, 1, DType::f32);
  const auto expected = x.to_vector<float>();
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    CHECK(x.clone().to_vector<float>() == expected);
    CHECK(strided_copy_of(x).to_vector<float>() == expected);
    CHECK(x.to(DType::f64).to(DType::f32).to_vector<float>() == expected);
    const auto turned = x.slice(0, 0, 300000).view({300, 1000}).transpose(0, 1).contiguous();
    CHECK(turned.transpose(0, 1).to_vector<float>() == x.slice(0, 0, 300000).to_vector<float>());
  }
  set_num_threads(0);
}

TEST_CASE("an expanded source is repeated; bool follows truth; NaN and infinity stay") {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  Tensor d = zeros({3, 2}, DType::bf16, kCpu);
  copy_(d, from_vector<float>({1, 2}).expand({3, 2}));
  CHECK(values(d) == V{1, 2, 1, 2, 1, 2});
  CHECK(values(from_vector<float>({0.0f, 0.5f, -2, nan}).to(DType::boolean)) == V{0, 1, 1, 1});
  for (const DType t : {DType::f64, DType::bf16, DType::f16}) {
    const auto v = from_vector<float>({nan, inf, -inf, -0.0f}).to(t).to_vector<float>();
    CHECK((std::isnan(v[0]) && v[1] == inf && v[2] == -inf && std::signbit(v[3])));
  }
}

TEST_CASE("fill, zeros, full, ones and arange over any strides") {
  Tensor x = zeros({3, 4}, DType::i32, kCpu);
  Tensor middle = x.slice(0, 1, 2).slice(1, 1, 3);
  fill_(middle, 7);
  CHECK(values(x) == V{0, 0, 0, 0, 0, 7, 7, 0, 0, 0, 0, 0});
  CHECK(values(full({2}, -3, DType::i64, kCpu)) == V{-3, -3});
  CHECK(values(ones({2}, DType::boolean, kCpu)) == V{1, 1});
  CHECK(values(arange(0, DType::f32, kCpu)) == V{});
  CHECK(contains(error_of([] { arange(-1, DType::f32, kCpu); }), "negative size"));
  std::vector<int64_t> far(70'001);  // beyond what bf16, f16 and u8 hold
  std::iota(far.begin(), far.end(), 0);
  for (const DType t : kAllDTypes) CHECK((bits(arange(70'001, t, kCpu)) == bits(from_vector(far).to(t))));
  CHECK(full({}, 2.5, DType::f64, kCpu).item() == 2.5);
}

TEST_CASE("use_count tells whether anybody else sees the storage") {
  Tensor x = count({4});
  CHECK(x.use_count() == 1);
  const Tensor view = x.slice(0, 1, 2);
  CHECK(x.use_count() == 2);
  CHECK(x.contiguous().storage() == x.storage());
  CHECK(x.clone().storage() != x.storage());
  CHECK(x.to(DType::f32).storage() == x.storage());
}

TEST_CASE("storage of somebody else is released with its last view") {
  auto owner = std::make_shared<std::vector<float>>(std::vector<float>{1, 2, 3});
  const std::weak_ptr<std::vector<float>> alive = owner;
  Tensor view;
  {
    auto storage = std::make_shared<Storage>(owner->data(), 12, kCpu, owner);
    owner.reset();
    view = Tensor(storage, {3}, {1}, 0, DType::f32).slice(0, 1, 3);
  }
  CHECK(!alive.expired());
  CHECK(values(view) == V{2, 3});
  view = {};
  CHECK(alive.expired());
}

TEST_CASE("tensor refusals say what was found") {
  const Tensor x = count({2, 3});
  CHECK(contains(error_of([&] { x.slice(1, 1, 4); }), "slice [1, 4) is out of range for dimension 1 of (2, 3)"));
  CHECK(contains(error_of([&] { x.select(2, 0); }), "dimension 2 is out of range for shape (2, 3)"));
  CHECK(contains(error_of([&] { x.permute({0, 0}); }), "names dimension 0 twice"));
  CHECK(contains(error_of([&] { x.squeeze(0); }), "squeeze: dimension 0 of (2, 3) is not 1"));
  CHECK(contains(error_of([&] { x.expand({4, 3}); }), "(2, 3) does not expand to (4, 3)"));
  CHECK(contains(error_of([&] { x.view({4, -1}); }), "view: 6 values do not fill (4, -1)"));
  CHECK(contains(error_of([&] { x.view({-1, -1}); }), "more than one -1"));
  CHECK(contains(error_of([&] { x.item(); }), "item() needs one value, found (2, 3)"));
  CHECK(contains(error_of([&] { empty({2, -3}, DType::f32, kCpu); }), "negative size"));
  CHECK(contains(error_of([&] { empty({1 << 30, 1 << 30, 8}, DType::f32, kCpu); }), "larger than any memory"));
  CHECK(contains(error_of([&] { from_vector<float>({1, 2}, {3}); }), "2 values do not fill (3,)"));
  CHECK(contains(error_of([&] { Tensor d = x; copy_(d, count({3, 2})); }), "shapes differ: (2, 3) from (3, 2)"));
  CHECK(contains(error_of([] { broadcast_shapes({2, 3}, {4}); }), "(2, 3) and (4,) do not broadcast: 3 against 4"));
  CHECK(broadcast_shapes({2, 1, 3}, {4, 1}) == Shape{2, 4, 3});
  CHECK(describe(x) == "float32 (2, 3) cpu");
}

TEST_CASE("cuda: copies, casts and fills equal the cpu's", "[cuda]") {
  REQUIRE(cuda_device_count() > 0);
  const Device gpu = cuda_device();
  const Tensor x = random_tensor({5, 3, 70}, Uniform{0, 200}, 1);  // in the range of every dtype
  for (const DType t : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32, DType::u8}) {
    const Tensor here = x.to(t), there = here.to(gpu);
    CHECK(there.to_vector<double>() == here.to_vector<double>());
    CHECK(there.transpose(0, 2).contiguous().to_vector<double>() == here.transpose(0, 2).to_vector<double>());
    CHECK(strided_copy_of(there).to_vector<double>() == here.to_vector<double>());
    CHECK(x.to(DType::f32).to(gpu).to(t).to_vector<double>() == x.to(DType::f32).to(t).to_vector<double>());
    Tensor part = there.slice(1, 0, 2);
    fill_(part, 3);
    CHECK(there.select(1, 1).to_vector<double>() == std::vector<double>(5 * 70, 3.0));
  }
}

TEST_CASE("cuda: arange equals the cpu's, and a captured step may count", "[cuda]") {
  REQUIRE(cuda_device_count() > 0);
  const Device gpu = cuda_device();
  for (const DType t : kAllDTypes)
    for (const int64_t n : {0, 1, 255, 257, 70'001, 132 * 32 * 256 + 3}) {
      INFO(fmt::format("{} {}", t, n));
      CHECK((bits(arange(n, t, gpu)) == bits(arange(n, t, kCpu))));
    }
  MemoryPool pool(gpu);
  CapturedGraph graph(gpu);
  Tensor counted;
  {
    const MemoryPool::Scope scope(pool);
    graph.begin();
    counted = arange(1000, DType::i64, gpu);
    graph.end();
  }
  for (int i = 0; i < 2; ++i) {
    fill_(counted, -1);
    graph.replay();
    CHECK(values(counted) == values(arange(1000, DType::i64, kCpu)));
  }
}
