// Layers and models whose sequences lie over the ranks against one rank that holds all of them: outputs, gradients of
// inputs and parameters, losses, dropout.
#include <algorithm>
#include <cmath>

#include "core/comm/collectives.h"
#include "core/comm/job.h"
#include "core/device.h"
#include "core/random.h"
#include "kernels/elementwise.h"
#include "layers/model.h"
#include "layers/registry.h"
#include "tests/parallel/world.h"
#include "tests/testing/tensors.h"
#include "train/yaml.h"

namespace krait::layers {
namespace {

// Away from the start, where gates do not depend on the input yet and attention is nearly uniform.
void stir(ParameterStore& store) {
  for (auto& entry : store.named_masters()) {
    if (entry.name.find("grid") != std::string::npos) continue;
    const Tensor noise = random_tensor(entry.value.shape(), Normal{.std = 0.2}, entry.name.size() + 17);
    copy_(entry.value, kernels::add(entry.value, noise.to(entry.value.dtype()).to(entry.value.device())));
  }
  if (store.compute().defined()) store.refresh_compute();
}

StoreOptions precision(DType dtype, Device device) {
  return {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype, .seed = 3};
}
double allowed(DType dtype) { return dtype == DType::f64 ? 1e-11 : 1e-5; }

Tensor own(const Tensor& t) {
  const int64_t l = t.size(1) / world()->size();
  return t.slice(1, world()->rank() * l, (world()->rank() + 1) * l).contiguous();
}

double largest(const Tensor& t) {
  double size = 0;
  for (const double v : t.to_vector<double>()) size = std::max(size, std::abs(v));
  return size;
}

void check_gradients(const ParameterStore& part, const ParameterStore& full, Tensor grad, double tolerance) {
  const auto found = part.named(comm::all_reduce(grad, *world())), wanted = full.named_grads();
  REQUIRE(found.size() == wanted.size());
  std::vector<double> sizes;
  for (const auto& w : wanted) sizes.push_back(largest(w.value));
  const double all = *std::max_element(sizes.begin(), sizes.end());
  for (size_t i = 0; i < wanted.size(); ++i) {
    INFO(wanted[i].name);
    // Queries that see one position have no gradient: their weights' is what the rounding of larger terms leaves.
    const double difference = relative_error(found[i].value, wanted[i].value) * std::max(sizes[i], 1e-6);
    CHECK(difference < tolerance * std::max(sizes[i], 1e-3 * all));
  }
}

// The source of random numbers while a test runs.
struct Source {
  explicit Source(Device device, int64_t batch_offset = 0) {
    current_random() = {7, from_vector<int64_t>({5}).view({}).to(device), batch_offset};
  }
  ~Source() { current_random() = {}; }
};

// ---- mixers

struct Family {
  std::string kind, options;  // options in YAML
  int64_t d_model = 16;
  bool tight = true;          // its fp32 sums are short
};

const std::vector<Family> kFamilies{
    {"attention", "{n_heads: 4}"},
    {"attention", "{n_heads: 4, sequence_parallel: ring}"},
    {"attention", "{n_heads: 4, n_kv_heads: 2, sequence_parallel: ring, qk_norm: true}"},
    {"attention", "{n_heads: 4, n_kv_heads: 1}"},
    {"attention", "{n_heads: 12, n_kv_heads: 3}", 24},
    {"attention", "{n_heads: 3}", 24},
    {"attention", "{n_heads: 4, alibi: true}"},
    {"attention", "{n_heads: 4, n_kv_heads: 2, alibi: true, sequence_parallel: ring}"},
    {"attention", "{n_heads: 4, n_kv_heads: 2, window: 3}"},
    {"attention", "{n_heads: 4, alibi: true, window: 6}"},
    {"attention", "{n_heads: 4, window: 13, sequence_parallel: ring}"},
    {"attention", "{n_heads: 4, window: 7, sequence_parallel: all_to_all}"},
    {"slstm", "{n_heads: 4}"},
    {"slstm", "{n_heads: 1, conv: 0}", 6},
    {"slstm", "{n_heads: 3, conv: 5, forget_gate: exp}", 9},
    {"rnn", "{}", 6},
    {"lstm", "{hidden: 5}", 6},
    {"gru", "{}", 5},
    {"gated_cnn", "{}"},
    {"gated_cnn", "{d_conv: 7}"},
    {"gated_cnn", "{d_conv: 1}"},
    {"s4", "{d_state: 8}", 8, false},
    {"s4d", "{d_state: 8}", 12},
    {"s4d", "{d_state: 6, n_ssm: 3, bidirectional: true, copies: 2}", 12},
    {"s4d", "{d_state: 4}", 5},
    {"s4", "{d_state: 4, copies: 2}", 7, false},
    {"s4d", "{d_state: 4, n_ssm: 3, bidirectional: true}", 3}};

struct Layer {
  Layer(const Family& family, DType dtype, Device device, int64_t length, const comm::GroupPtr& sequence)
      : mixer(build(family, length, sequence)), store(*mixer, precision(dtype, device)) {
    stir(store);
  }
  static std::shared_ptr<Mixer> build(const Family& family, int64_t length, const comm::GroupPtr& sequence) {
    ConfigNode section = train::parse_yaml("model: {type: classifier, n_classes: 2, d_model: " + std::to_string(family.d_model) + ", n_layers: 1, layers: [" + family.kind +
                                        "], " + family.kind + ": " + family.options + "}", "test.yaml");
    const ModelConfig config = read_model_config(*section.find("model"));
    LayerContext context;
    context.d_model = family.d_model;
    context.n_branches = 4;
    context.context = length;
    context.init_std = 0.3;
    context.residual_std = 0.3;
    context.parallel.sequence = sequence;
    return make_mixer(family.kind, config.options_of(family.kind), context);
  }
  std::shared_ptr<Mixer> mixer;
  ParameterStore store;
};

// The document of position t of a row, in pieces of l.
using Documents = std::function<int64_t(int64_t row, int64_t t, int64_t l)>;
const std::vector<std::pair<std::string, Documents>> kDocuments{
    {"one document", nullptr},
    {"begins at every edge", [](int64_t, int64_t t, int64_t l) { return t / l; }},
    {"begins in the middle of the second piece in one row, never in the other",
     [](int64_t row, int64_t t, int64_t l) { return row == 0 && t >= l + l / 2 ? 5 : 3; }},
    {"short ones", [](int64_t row, int64_t t, int64_t) { return (t + row) / 5; }}};

Tensor segments_of(const Documents& documents, int64_t b, int64_t length) {
  const int64_t l = length / world()->size();
  std::vector<int32_t> ids;
  for (int64_t row = 0; row < b; ++row)
    for (int64_t t = 0; t < length; ++t) ids.push_back(static_cast<int32_t>(documents(row, t, l)));
  return from_vector(ids, {b, length});
}

void check_family(const Family& family, DType dtype, Device device, int64_t b, int64_t l) {
  const int64_t length = world()->size() * l;
  const Tensor x = random_tensor({b, length, family.d_model}, Normal{}, 1).to(dtype).to(device);
  const Tensor dy = random_tensor({b, length, family.d_model}, Normal{}, 2).to(dtype).to(device);
  const double tolerance = allowed(dtype) * (dtype != DType::f64 && !family.tight ? 10 : 1);
  for (const auto& [what, documents] : kDocuments) {
    INFO(family.kind << " " << family.options << ", " << what << ", batch " << b << ", pieces of " << l);
    Layer full(family, dtype, device, length, comm::single_group("sequence")), part(family, dtype, device, length, world());
    SequenceInfo info, own_info;
    if (documents) {
      info.segments = segments_of(documents, b, length).to(device);
      own_info.segments = own(info.segments);
    }
    const Variable whole_x(x, true), own_x(own(x), true);
    const Variable y = full.mixer->forward(whole_x, info, nullptr), own_y = part.mixer->forward(own_x, own_info, nullptr);
    CHECK(relative_error(own_y.data(), own(y.data())) < tolerance);
    backward(y, dy);
    backward(own_y, own(dy));
    CHECK(relative_error(own_x.grad(), own(whole_x.grad())) < tolerance);
    check_gradients(part.store, full.store, part.store.grad(), tolerance);
  }
}

// ---- models

struct ModelCase {
  std::string name, model;  // YAML
  bool per_token = true;
};
const std::vector<ModelCase> kModels{
    {"gpt2 with dropout", "{d_model: 16, n_layers: 2, norm: layer, position: learned, max_positions: 64, dropout: 0.2, "
                          "attention: {n_heads: 4, rope: false}, mlp: {type: gelu_tanh}}"},
    {"llama, ring, dropout", "{d_model: 16, n_layers: 2, dropout: 0.2, attention: {n_heads: 4, n_kv_heads: 2, "
                             "sequence_parallel: ring}, mlp: {type: swiglu}, tie_embeddings: false}"},
    {"window, dropout", "{d_model: 16, n_layers: 2, dropout: 0.2, attention: {n_heads: 4, window: 6}, mlp: {type: swiglu}}"},
    {"moe", "{d_model: 16, n_layers: 2, layers: [gated_cnn], mlp: {type: moe, hidden: 12, n_experts: 4, top_k: 2, "
            "n_null_experts: 2, balance_coef: 0.1, z_coef: 0.1}}"},
    {"kan, slstm", "{d_model: 16, n_layers: 2, layers: [slstm], slstm: {n_heads: 4}, mlp: {type: kan, hidden: 8}}"},
    {"s4 with dropout", "{d_model: 16, n_layers: 2, layers: [s4d], dropout: 0.3, norm_position: post, s4d: {d_state: 4}, "
                        "mlp: {type: none}}"}};
const std::vector<ModelCase> kClassifiers{
    {"pooled", "{type: classifier, d_model: 16, n_layers: 2, layers: [s4d], head: pooled, n_classes: 3, dropout: 0.2, "
               "s4d: {d_state: 4, bidirectional: true}, mlp: {type: none}}", false},
    {"moe", "{type: classifier, d_model: 16, n_layers: 2, layers: [gated_cnn], head: pooled, n_classes: 3, mlp: {type: moe, "
            "hidden: 12, n_experts: 4, top_k: 2, n_null_experts: 2, balance_coef: 0.1, z_coef: 0.1}}", false},
    {"last", "{type: classifier, d_model: 16, n_layers: 1, layers: [gru], head: last, n_classes: 3}", false}};

constexpr int64_t kVocab = 29;

ModelInput language_input(int64_t b, int64_t length, bool documents) {
  ModelInput input;
  input.tokens = random_integers({b, length}, {0, kVocab}, 1);
  input.targets = random_integers({b, length}, {0, kVocab}, 2);
  for (int64_t i = 0; i < b * length; i += 3) input.targets.data<int64_t>()[i] = -100;
  if (!documents) return input;
  input.info.segments = segments_of(kDocuments[3].second, b, length);
  input.info.positions = empty({b, length}, DType::i32, kCpu);
  for (int64_t i = 0; i < b * length; ++i) {
    const bool first = i % length == 0 || input.info.segments.data<int32_t>()[i] != input.info.segments.data<int32_t>()[i - 1];
    input.info.positions.data<int32_t>()[i] = first ? 0 : input.info.positions.data<int32_t>()[i - 1] + 1;
  }
  return input;
}
ModelInput classifier_input(int64_t b, int64_t length, bool lengths) {
  ModelInput input;
  input.tokens = random_integers({b, length}, {0, kVocab}, 1);
  input.targets = random_integers({b}, {0, 3}, 2);
  if (!lengths) return input;
  std::vector<int32_t> n;
  for (int64_t row = 0; row < b; ++row) n.push_back(static_cast<int32_t>(1 + row * (length - 1) / std::max<int64_t>(1, b - 1)));
  input.lengths = from_vector(n);
  return input;
}

void check_model(const ModelCase& c, const ModelInput& input, DType dtype) {
  ConfigNode root = train::parse_yaml("model: " + c.model, "test.yaml");
  const ModelConfig config = read_model_config(*root.find("model"));
  const ModelShape shape{.vocab_size = kVocab, .context = input.tokens.size(1)};
  const auto full = make_model(config, shape), part = make_model(config, shape, {}, {.sequence = world()});
  ParameterStore full_store(*full, precision(dtype, kCpu)), part_store(*part, precision(dtype, kCpu));
  stir(full_store);
  stir(part_store);
  full->set_training(true);
  part->set_training(true);
  const Source source(kCpu, 3);
  for (const bool recompute : {false, true}) {
    INFO(c.name << (recompute ? ", recomputed" : ""));
    zero_(full_store.grad());
    zero_(part_store.grad());
    part->set_recompute(recompute);
    const ModelLoss wanted = full->loss(input, {});
    // The count of the whole batch, as a trainer gives it; without it, the same.
    const ModelLoss found = part->loss(slice_sequence(input, *world()), recompute ? wanted.count : Tensor());
    const auto sum = [](const Tensor& t) { return comm::all_reduce(t, *world()); };
    CHECK(relative_error(sum(found.loss.data()), wanted.loss.data()) < allowed(dtype));
    CHECK(relative_error(sum(found.loss_sum), wanted.loss_sum) < allowed(dtype));
    REQUIRE(found.auxiliary.defined() == wanted.auxiliary.defined());
    if (wanted.auxiliary.defined()) CHECK(relative_error(sum(found.auxiliary), wanted.auxiliary) < allowed(dtype));
    if (!recompute) CHECK(sum(found.count).item() == wanted.count.item());
    backward(wanted.loss);
    backward(found.loss);
    check_gradients(part_store, full_store, part_store.grad(), allowed(dtype) * (dtype == DType::f64 ? 1 : 10));
  }
}

TEST_CASE("layers over ranks equal one rank in fp64") {
  for (const Family& family : kFamilies)
    for (const auto& [b, l] : {std::pair<int64_t, int64_t>{1, 5}, {2, 4}, {4, 8}, {3, 1}}) check_family(family, DType::f64, kCpu, b, l);
}

TEST_CASE("layers over ranks equal one rank in fp32") {
  for (const Family& family : kFamilies) check_family(family, DType::f32, kCpu, 2, 7);
}

TEST_CASE("language models over ranks equal one rank") {
  for (const ModelCase& c : kModels)
    for (const DType dtype : {DType::f64, DType::f32})
      for (const bool documents : {false, true}) check_model(c, language_input(2, world()->size() * 8, documents), dtype);
}

TEST_CASE("classifiers over ranks equal one rank") {
  for (const ModelCase& c : kClassifiers)
    for (const DType dtype : {DType::f64, DType::f32})
      for (const bool lengths : {false, true}) check_model(c, classifier_input(4, world()->size() * 5, lengths), dtype);
}

TEST_CASE("a carried state goes on over ranks: every window's outputs, and the state behind it on every rank") {
  const std::vector<Family> families{
      {"gated_cnn", "{d_conv: 4}"}, {"rnn", "{}", 6}, {"lstm", "{hidden: 5}", 6}, {"gru", "{}", 5},
      {"slstm", "{n_heads: 4}"}, {"slstm", "{n_heads: 1, conv: 0}", 6}, {"slstm", "{n_heads: 3, forget_gate: exp}", 9},
      {"s4d", "{d_state: 8}", 12}, {"s4d", "{d_state: 4}", 5}, {"s4d", "{d_state: 6, n_ssm: 3, copies: 2}", 3}};
  for (const Family& family : families)
    for (const int64_t b : {4, 3, 1})  // whole rows, groups of rows one rank after the other
      for (const bool documents : {false, true}) {
        INFO(family.kind << " " << family.options << ", " << b << " rows, documents " << documents);
        const int64_t l = 4, length = l * world()->size();
        Layer full(family, DType::f64, kCpu, length, comm::single_group("sequence")), part(family, DType::f64, kCpu, length, world());
        LayerState whole = full.mixer->initial_state(b, length, DType::f64, kCpu), mine = part.mixer->initial_state(b, length, DType::f64, kCpu);
        for (uint64_t step = 0; step < 3; ++step) {
          const Tensor x = random_tensor({b, length, family.d_model}, Normal{}, 1 + step);
          SequenceInfo info, own_info;
          if (documents) {
            info.segments = segments_of(kDocuments[2 + step % 2].second, b, length);
            own_info.segments = own(info.segments);
          }
          const Variable y = full.mixer->forward(Variable(x), info, &whole), own_y = part.mixer->forward(Variable(own(x)), own_info, &mine);
          CHECK(relative_error(own_y.data(), own(y.data())) < 1e-11);
          CHECK(mine.length == whole.length);
          for (const auto& [name, value] : whole.tensors)
            if (mine.tensors.count(name)) CHECK(relative_error(mine.tensors.at(name), value) < 1e-11);
          CHECK(mine.tensors.size() == whole.tensors.size());
        }
      }
}

TEST_CASE("what cannot be spread over ranks says so") {
  const Family s4{"s4", "{d_state: 4}", 5};
  Layer part(s4, DType::f64, kCpu, 4 * world()->size(), world());
  const Variable x(random_tensor({3, 4, 5}, Normal{}, 1));
  LayerState state = part.mixer->initial_state(3, 4, DType::f64, kCpu);
  CHECK(contains(error_of([&] { part.mixer->forward(x, {}, &state); }), "set data.state: reset"));
  ModelInput input;
  input.tokens = zeros({1, 4 * world()->size() + 1}, DType::i32, kCpu);
  CHECK(contains(error_of([&] { slice_sequence(input, *world()); }), "do not split over"));
  const Family three{"attention", "{n_heads: 3, sequence_parallel: all_to_all}", 12};
  if (3 % world()->size() != 0) {
    Layer layer(three, DType::f64, kCpu, 4 * world()->size(), world());
    CHECK(contains(error_of([&] { layer.mixer->forward(Variable(zeros({1, 4, 12}, DType::f64, kCpu)), {}, nullptr); }),
                   "3 heads do not spread over"));
  }
}

TEST_CASE("layers over two GPUs equal one", "[cuda]") {
  const Device device = comm::local_cuda_device();
  for (const Family& family : kFamilies) check_family(family, DType::f32, device, 2, 24);
  for (const Family& family : kFamilies) check_family(family, DType::f64, device, 1, 9);
}

}  // namespace
}  // namespace krait::layers
