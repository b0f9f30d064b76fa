// Recurrent mixers whose sequence is spread over the ranks against one rank that holds all of it: outputs, gradients of
// inputs and parameters, carried states.
#include "autograd/state_passing.h"

#include "layers/registry.h"
#include "tests/parallel/layer_parallel.h"

namespace krait::layers {
namespace {

struct Family {
  std::string name, kind;
  int64_t d_model;
  std::vector<std::pair<std::string, ConfigNode>> options;
  bool splits = true;  // in two along heads or channels
};

ConfigNode number(int64_t n) { return ConfigNode::of(n); }

const std::vector<Family> kFamilies{
    {"mamba", "mamba", 12, {{"d_state", number(5)}}},
    {"mamba, 16 states, wide filter", "mamba", 20, {{"d_conv", number(6)}}},
    {"mamba, no history", "mamba", 8, {{"d_conv", number(1)}, {"d_state", number(2)}}},
    {"mamba2", "mamba2", 8, {{"head_dim", number(4)}, {"d_state", number(6)}, {"chunk_size", number(8)}}},
    {"mamba2, 2 groups", "mamba2", 12, {{"head_dim", number(3)}, {"d_state", number(5)}, {"n_groups", number(2)}, {"chunk_size", number(4)}}},
    {"mlstm", "mlstm", 16, {{"n_heads", number(2)}, {"inner", number(24)}, {"chunk_size", number(4)}}},
    {"mlstm_large", "mlstm_large", 16, {{"n_heads", number(2)}, {"chunk_size", number(8)}}},
    {"linear attention", "linear_attention", 12, {{"n_heads", number(2)}, {"chunk_size", number(4)}}},
    {"gated linear attention", "linear_attention", 12, {{"n_heads", number(3)}, {"gate", ConfigNode::of(true)}}, false},
    {"linear attention, not normalised", "linear_attention", 12,
     {{"n_heads", number(2)}, {"gate", ConfigNode::of(true)}, {"feature", ConfigNode::of(std::string("identity"))}}}};

struct Layer {
  Layer(const Family& family, DType dtype, Device device, const Parallel& parallel)
      : mixer(build(family, parallel)), store(*mixer, store_options(dtype, device)) {}
  static std::shared_ptr<Mixer> build(const Family& family, const Parallel& parallel) {
    ConfigNode section = ConfigNode::map();
    for (const auto& [key, value] : family.options) section.set(key, value);
    LayerContext context;
    context.d_model = family.d_model;
    context.n_branches = 4;
    context.init_std = 0.3;
    context.residual_std = 0.3;
    context.parallel = parallel;
    auto mixer = make_mixer(family.kind, section, context);
    mixer->set_primary(parallel.tensor->rank() == 0);
    return mixer;
  }
  std::shared_ptr<Mixer> mixer;
  ParameterStore store;
};

// The same layer on one rank and over groups, away from the start, where gates do not depend on the input yet.
struct Pair {
  Pair(const Family& family, DType dtype, Device device, const Parallel& parallel)
      : full(family, dtype, device, {}), part(family, dtype, device, parallel), group(parallel.sequence) {
    stir(full.store);
    set_masters(part.store, masters_of(full.store));
  }
  Tensor own(const Tensor& t) const {
    const int64_t l = t.size(1) / group->size();
    return t.slice(1, group->rank() * l, (group->rank() + 1) * l).contiguous();
  }
  void check_gradients(double allowed, DType dtype) {
    const Tensor sum = comm::all_reduce(part.store.grad(), *group);
    const auto found = part.store.parts(sum), wanted = full.store.parts(full.store.grad());
    // What cancels (mLSTM's input bias, which the norm behind it all but undoes) has the rounding errors of its terms.
    const double least = (dtype == DType::f64 ? 1e-3 : 3e-2) * largest(full.store.grad());
    for (size_t i = 0; i < wanted.size(); ++i) {
      INFO(wanted[i].name);
      const Tensor difference = kernels::sub(found[i].value, local_values(wanted[i].value, found[i].shard));
      CHECK(largest(difference) <= allowed * std::max(largest(wanted[i].value), least));
    }
  }
  Layer full, part;
  comm::GroupPtr group;
};

// The document of position t of a row, in pieces of l.
using Documents = std::function<int64_t(int64_t row, int64_t t, int64_t l)>;
const std::vector<std::pair<std::string, Documents>> kDocuments{
    {"one document", nullptr},
    {"begins at every edge", [](int64_t, int64_t t, int64_t l) { return t / l; }},
    {"begins at the second edge, and behind the first", [](int64_t, int64_t t, int64_t l) { return (t > l) + (t >= 2 * l); }},
    {"begins in the middle of the second piece in one row, never in the other",
     [](int64_t row, int64_t t, int64_t l) { return row == 0 && t >= l + l / 2 ? 5 : 3; }},
    {"short ones", [](int64_t row, int64_t t, int64_t) { return (t + row) / 5; }}};

Tensor segments_of(const Documents& documents, int64_t b, int64_t l, int64_t pieces) {
  std::vector<int32_t> ids;
  for (int64_t row = 0; row < b; ++row)
    for (int64_t t = 0; t < l * pieces; ++t) ids.push_back(static_cast<int32_t>(documents(row, t, l)));
  return from_vector(ids, {b, l * pieces});
}

void check_family(const Family& family, DType dtype, Device device, const Parallel& parallel, int64_t b, int64_t l) {
  const int64_t s = parallel.sequence->size(), d = family.d_model;
  const double allowed = dtype == DType::f64 ? 1e-11 : 1e-5;
  const Tensor x = random_tensor({b, s * l, d}, Normal{}, 1).to(dtype).to(device);
  const Tensor dy = random_tensor({b, s * l, d}, Normal{}, 2).to(dtype).to(device);
  for (const auto& [what, documents] : kDocuments) {
    INFO(family.name << ", " << what << ", batch " << b << ", pieces of " << l);
    Pair p(family, dtype, device, parallel);
    SequenceInfo info, own_info;
    if (documents) {
      info.segments = segments_of(documents, b, l, s).to(device);
      own_info.segments = p.own(info.segments);
    }
    const Variable whole_x(x, true), own_x(p.own(x), true);
    const Variable y = p.full.mixer->forward(whole_x, info, nullptr);
    const Variable own_y = p.part.mixer->forward(own_x, own_info, nullptr);
    CHECK(relative_error(own_y.data(), p.own(y.data())) < allowed);
    backward(y, dy);
    backward(own_y, p.own(dy));
    CHECK(relative_error(own_x.grad(), p.own(whole_x.grad())) < allowed);
    p.check_gradients(allowed, dtype);
  }
}

void check_carried_states(const Family& family, DType dtype, Device device, const Parallel& parallel, int64_t l) {
  const int64_t s = parallel.sequence->size(), d = family.d_model, b = 2;
  const double allowed = dtype == DType::f64 ? 1e-11 : 1e-5;
  Pair p(family, dtype, device, parallel);
  LayerState whole_state = p.full.mixer->initial_state(b, s * l, dtype, device);
  LayerState own_state = p.part.mixer->initial_state(b, s * l, dtype, device);
  for (uint64_t step = 0; step < 3; ++step) {
    INFO(family.name << ", step " << step);
    const Tensor x = random_tensor({b, s * l, d}, Normal{}, 1 + step).to(dtype).to(device);
    SequenceInfo info, own_info;
    if (step == 2) {
      info.segments = segments_of(kDocuments[4].second, b, l, s).to(device);
      own_info.segments = p.own(info.segments);
    }
    const Variable whole_x(x, true), own_x(p.own(x), true);
    const Variable y = p.full.mixer->forward(whole_x, info, &whole_state);
    const Variable own_y = p.part.mixer->forward(own_x, own_info, &own_state);
    CHECK(relative_error(own_y.data(), p.own(y.data())) < allowed);
    backward(y, x);
    backward(own_y, p.own(x));
    CHECK(relative_error(own_x.grad(), p.own(whole_x.grad())) < allowed);
    CHECK(own_state.length == whole_state.length);
    if (parallel.tensor->size() > 1) continue;  // a share of the state
    for (const auto& [name, value] : whole_state.tensors) {
      INFO(name);
      CHECK(relative_error(own_state.tensors[name], value) < allowed);
    }
  }
  p.check_gradients(allowed, dtype);
}

Device own_device() { return cuda_device(world()->rank()); }
Parallel over_sequence() { return {comm::single_group("tensor"), world()}; }

}  // namespace

TEST_CASE("recurrent mixers over a sequence spread over ranks are those over the whole, in fp64") {
  for (const Family& family : kFamilies)
    for (const auto& [b, l] : {std::pair<int64_t, int64_t>{1, 1}, {2, 2}, {1, 7}, {2, 33}})
      check_family(family, DType::f64, kCpu, over_sequence(), b, l);
}

TEST_CASE("recurrent mixers over a sequence spread over ranks are those over the whole, in fp32") {
  for (const Family& family : kFamilies) check_family(family, DType::f32, kCpu, over_sequence(), 2, 19);
}

TEST_CASE("recurrent mixers split both sequence and heads or channels") {
  if (world()->size() != 4) return;
  const comm::Mesh mesh = comm::make_mesh(world(), 1, 2, 2);
  const Parallel parallel{mesh.tensor, mesh.sequence};
  for (const Family& family : kFamilies) {
    if (!family.splits) continue;
    check_family(family, DType::f64, kCpu, parallel, 2, 9);
    check_family(family, DType::f32, kCpu, parallel, 1, 20);
    check_carried_states(family, DType::f64, kCpu, parallel, 7);
  }
}

TEST_CASE("recurrent mixers carry their states from one spread sequence into the next") {
  for (const Family& family : kFamilies) {
    check_carried_states(family, DType::f64, kCpu, over_sequence(), 9);
    check_carried_states(family, DType::f32, kCpu, over_sequence(), 6);
  }
}

TEST_CASE("a carried state and pieces shorter than the filter are refused") {
  const Layer part(kFamilies[0], DType::f32, kCpu, over_sequence());
  LayerState state = part.mixer->initial_state(1, 8, DType::f32, kCpu);
  const Variable x(ones({1, 2, kFamilies[0].d_model}, DType::f32, kCpu));
  CHECK(contains(error_of([&] { part.mixer->forward(x, {}, &state); }), "lower parallelism.sequence"));
}

TEST_CASE("cuda: recurrent mixers over a sequence spread over ranks are those over the whole", "[cuda]") {
  for (const Family& family : kFamilies) {
    for (const auto& [b, l] : {std::pair<int64_t, int64_t>{1, 1}, {2, 7}, {1, 150}})
      check_family(family, DType::f64, own_device(), over_sequence(), b, l);
    check_family(family, DType::f32, own_device(), over_sequence(), 2, 130);
    check_carried_states(family, DType::f64, own_device(), over_sequence(), 70);
  }
}

}  // namespace krait::layers
