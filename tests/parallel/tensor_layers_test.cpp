// Layers and models whose heads, channels and vocabulary lie over the ranks against one rank that has all of them.
#include "core/comm/job.h"
#include "layers/decoder.h"
#include "layers/registry.h"
#include "tests/parallel/layer_parallel.h"

namespace krait::layers {
namespace {

double allowed(DType dtype) { return dtype == DType::f64 ? 1e-11 : 1e-5; }

// A block's mixer and mlp as the model section names them, at width 32 where nothing else is said.
struct Family {
  std::string name, yaml;
  double slack = 1;  // of the fp32 tolerance, for long chains of sums
  bool streams = true;
};
const std::vector<Family> kFamilies{
    {"attention", "layers: [attention], attention: {n_heads: 4, bias: true}, mlp: {type: gelu, bias: true}"},
    {"gqa, fewer kv heads than ranks", "layers: [attention], attention: {n_heads: 8, n_kv_heads: 1, qk_norm: true, bias: true}, mlp: {type: swiglu}"},
    {"gqa, two kv heads", "layers: [attention], attention: {n_heads: 8, n_kv_heads: 2, window: 5}, mlp: {type: gelu_tanh}"},
    {"alibi", "layers: [attention], attention: {n_heads: 4, alibi: true}, mlp: {type: swiglu, bias: true}, norm: layer"},
    {"mlp kinds", "layers: [attention], attention: {n_heads: 4}, mlp: {type: relu2}, norm_position: post"},
    {"gelu_gated", "layers: [attention], attention: {n_heads: 4}, mlp: {type: gelu_gated, bias: true}"},
    {"kan", "layers: [attention], attention: {n_heads: 4}, mlp: {type: kan, hidden: 12}"},
    {"moe", "layers: [attention], attention: {n_heads: 4}, mlp: {type: moe, hidden: 24, n_experts: 8, top_k: 3}"},
    {"moe with null experts", "layers: [attention], attention: {n_heads: 4}, mlp: {type: moe, hidden: 8, n_experts: 4, n_null_experts: 2, top_k: 2, renormalize: false}"},
    {"mamba", "layers: [mamba], mamba: {d_state: 5, bias: true}, mlp: {type: none}"},
    {"mamba2, a group for all", "layers: [mamba2], mamba2: {d_state: 6, head_dim: 8, chunk_size: 4, bias: true}, mlp: {type: none}"},
    {"mamba2, two groups", "layers: [mamba2], mamba2: {d_state: 6, head_dim: 8, n_groups: 2, chunk_size: 4, D_has_hdim: true, norm_before_gate: true}, mlp: {type: none}"},
    {"mamba2, as many groups as heads", "layers: [mamba2], mamba2: {d_state: 6, head_dim: 8, n_groups: 8}, mlp: {type: none}"},
    {"mlstm", "layers: [mlstm], mlstm: {n_heads: 4, chunk_size: 4}, mlp: {type: none}", 4},
    {"mlstm_large", "layers: [mlstm_large], mlstm_large: {n_heads: 4, chunk_size: 4}, mlp: {type: swiglu}"},
    {"linear attention", "layers: [linear_attention], linear_attention: {n_heads: 4, gate: true, bias: true, chunk_size: 4}, mlp: {type: silu}"},
    {"gated_cnn", "layers: [gated_cnn], gated_cnn: {conv_ratio: 0.5}, mlp: {type: none}"},
    {"gated_cnn, all convolved", "layers: [gated_cnn], gated_cnn: {hidden: 32}, mlp: {type: none}"},
    {"slstm", "layers: [slstm], slstm: {n_heads: 4, recurrent_init: standard}, mlp: {type: none}"},
    {"slstm without convolution", "layers: [slstm], slstm: {n_heads: 8, conv: 0, recurrent_init: standard, ratio: 0}, mlp: {type: none}"},
    {"s4d", "layers: [s4d], s4d: {d_state: 6}, mlp: {type: none}"},
    {"s4d, a set for every channel, two copies", "layers: [s4d], s4d: {d_state: 6, n_ssm: 32, copies: 2, final_act: id}, mlp: {type: gelu}"},
    {"s4d, two sets", "layers: [s4d], s4d: {d_state: 6, n_ssm: 2, tie_dropout: true, init: random_diagonal}, mlp: {type: none}"},
    {"s4", "layers: [s4], s4: {d_state: 6, n_ssm: 4, copies: 2}, mlp: {type: none}", 20},
    {"s4, one set", "layers: [s4], s4: {d_state: 6}, mlp: {type: none}", 20},
    {"s4, dense", "layers: [s4], s4: {d_state: 4, init: random, n_ssm: 2}, mlp: {type: none}"},
    {"s4d, both directions", "type: classifier, n_classes: 3, layers: [s4d], s4d: {d_state: 6, bidirectional: true}, mlp: {type: none}", 1, false},
    {"lstm", "layers: [lstm], lstm: {hidden: 24}, mlp: {type: gelu}"},
};

ModelConfig config_of(const std::string& yaml, int64_t d_model = 32, int64_t n_layers = 1) {
  return model_of(fmt::format("{{d_model: {}, n_layers: {}, {}}}", d_model, n_layers, yaml));
}

SequenceInfo documents(int64_t b, int64_t l) {
  std::vector<int32_t> ids, positions;
  for (int64_t i = 0; i < b; ++i) {
    int32_t id = 0, position = 0;
    for (int64_t j = 0; j < l; ++j, ++position) {
      if (j > 0 && (j * 7 + i * 3) % 5 == 0) ++id, position = 0;
      ids.push_back(id);
      positions.push_back(position);
    }
  }
  return {from_vector(ids, {b, l}), from_vector(positions, {b, l})};
}

// The source of random numbers while a test runs.
struct Source {
  explicit Source(Device device) { current_random() = {7, from_vector<int64_t>({5}).view({}).to(device), 0}; }
  ~Source() { current_random() = {}; }
};

struct Pair {  // the same stack on one rank and over all
  Pair(const ModelConfig& config, int64_t context, DType dtype, Device device = kCpu)
      : one(config, context), part(config, context, Parallel{world()}),
        store(one, store_options(dtype, device)), shares((part.set_primary(world()->rank() == 0), part),
                                                          store_options(dtype, device)) {
    const auto mine = shares.parts(shares.master());
    const auto whole = store.parts(store.master());
    REQUIRE(mine.size() == whole.size());
    for (size_t i = 0; i < mine.size(); ++i) {  // first values are those of one rank
      INFO(mine[i].name);
      CHECK(relative_error(mine[i].value, local_values(whole[i].value, mine[i].shard)) == 0);
    }
    CHECK(shares.parameter_count() == store.parameter_count());
    stir(store);
    set_masters(shares, masters_of(store));
  }
  Decoder one, part;
  ParameterStore store, shares;
};

void check_family(const Family& f, DType dtype, Device device, bool packed, double dropout = 0) {
  INFO(f.name << ", " << name_of(dtype) << (packed ? ", documents" : "") << (dropout > 0 ? ", dropout" : ""));
  const int64_t b = 3, l = 13, d = 32;
  ModelConfig config = config_of(f.yaml + (dropout > 0 ? ", dropout: 0.25" : ""));
  Pair p(config, l, dtype, device);
  const Source source(device);
  p.one.set_training(true);
  p.part.set_training(true);
  SequenceInfo info;
  if (packed) {
    info = documents(b, l);
    info.segments = info.segments.to(device);
    info.positions = info.positions.to(device);
  }
  const Tensor x = random_tensor({b, l, d}, Normal{}, 1).to(dtype).to(device);
  const Tensor dy = random_tensor({b, l, d}, Normal{}, 2).to(dtype).to(device);
  Variable x_one(x, true), x_part(x, true);
  const Variable want = p.one.forward(x_one, info, nullptr), y = p.part.forward(x_part, info, nullptr);
  const double tolerance = allowed(dtype) * (dtype == DType::f64 ? 1 : f.slack);
  CHECK(relative_error(y.data(), want.data()) < tolerance);
  backward({want}, {dy});
  backward({y}, {dy});
  CHECK(relative_error(x_part.grad(), x_one.grad()) < tolerance);
  check_gradients(p.shares, p.store, tolerance);
}

}  // namespace

TEST_CASE("layers over a tensor group give one rank's outputs and gradients") {
  for (const Family& f : kFamilies)
    for (const DType dtype : {DType::f64, DType::f32})
      for (const bool packed : {false, true}) check_family(f, dtype, kCpu, packed);
}

TEST_CASE("dropout over a tensor group draws one rank's masks") {
  for (const Family& f : kFamilies) check_family(f, DType::f64, kCpu, false, 0.25);
}

TEST_CASE("states over a tensor group continue and step as on one rank") {
  for (const Family& f : kFamilies) {
    if (!f.streams) continue;
    INFO(f.name);
    const int64_t b = 3, l = 9;
    Pair p(config_of(f.yaml), l, DType::f64);
    const NoGrad guard;
    DecoderState one = p.one.initial_state(b, l, DType::f64, kCpu), part = p.part.initial_state(b, l, DType::f64, kCpu);
    int64_t at = 0;
    for (const int64_t n : {5, 1, 2, 1}) {
      const Variable x(random_tensor({b, n, 32}, Normal{}, static_cast<uint64_t>(at)));
      const Tensor want = p.one.forward(x, {}, &one).data(), y = p.part.forward(x, {}, &part).data();
      CHECK(relative_error(y, want) < 1e-11);
      at += n;
    }
  }
}

namespace {

void check_language_model(const std::string& yaml, const CrossEntropyOptions& loss, DType dtype, Device device,
                          int64_t vocab = 29) {
  INFO(yaml << ", " << name_of(dtype));
  const ModelConfig config = config_of(yaml, 32, 2);
  const ModelShape shape{.vocab_size = vocab, .context = 11};
  LanguageModel one(config, shape, loss), part(config, shape, loss, Parallel{world()});
  ParameterStore store(one, store_options(dtype, device)), shares(part, store_options(dtype, device));
  stir(store);
  set_masters(shares, masters_of(store));
  ModelInput input;
  Tensor targets = random_integers({3, 11}, {0, vocab}, 4);
  for (const int64_t ignored : {0, 7, 21}) targets.data<int64_t>()[ignored] = -100;
  input.tokens = random_integers({3, 11}, {0, vocab}, 3).to(device);
  input.targets = targets.to(device);
  input.info = documents(3, 11);
  input.info.segments = input.info.segments.to(device);
  input.info.positions = input.info.positions.to(device);
  const Tensor count = full({}, 17, DType::f32, device);
  const ModelLoss want = one.loss(input, count), found = part.loss(input, count);
  const double tolerance = allowed(dtype);
  CHECK(relative_error(found.loss.data(), want.loss.data()) < tolerance);
  CHECK(relative_error(found.loss_sum, want.loss_sum) < tolerance);
  CHECK(found.count.item() == want.count.item());
  backward(want.loss);
  backward(found.loss);
  check_gradients(shares, store, tolerance);

  const NoGrad guard;
  CHECK(relative_error(part.token_nll(input), one.token_nll(input)) < tolerance);
  CHECK(relative_error(part.logits(input).data(), one.logits(input).data()) < tolerance);
  const Tensor rows = from_vector<int64_t>({2, 32, 5}).to(device), wanted = from_vector<int64_t>({1, 0, vocab - 1}).to(device);
  const auto a = one.answers(input, rows, wanted), c = part.answers(input, rows, wanted);
  CHECK(relative_error(c.nll, a.nll) < tolerance);
  CHECK(c.likeliest.to_vector<int64_t>() == a.likeliest.to_vector<int64_t>());
  DecoderState s1 = one.initial_state(3, 11, store.options()), s2 = part.initial_state(3, 11, store.options());
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 6}, {6, 7}, {7, 8}})
    CHECK(relative_error(part.next_logits(input.tokens.slice(1, begin, end), s2),
                         one.next_logits(input.tokens.slice(1, begin, end), s1)) < tolerance);
}

const std::vector<std::string> kModels{
    "layers: [attention], attention: {n_heads: 4}, mlp: {type: swiglu}",
    "layers: [attention], attention: {n_heads: 4, rope: false}, position: learned, max_positions: 16, mlp: {type: gelu}, tie_embeddings: false",
    "layers: [attention], attention: {n_heads: 4}, mlp: {type: gelu}, pad_vocab_multiple: 16, logit_cap: 3",
};

}  // namespace

TEST_CASE("a vocabulary over a tensor group gives one rank's loss, gradients and logits") {
  for (const std::string& yaml : kModels)
    for (const DType dtype : {DType::f64, DType::f32})
      for (const CrossEntropyOptions& loss :
           {CrossEntropyOptions{}, CrossEntropyOptions{.label_smoothing = 0.1, .z_loss = 1e-3}})
        check_language_model(yaml, loss, dtype, kCpu);
  // The last rank has padding only.
  check_language_model("layers: [attention], attention: {n_heads: 4}, mlp: {type: gelu}, pad_vocab_multiple: 64",
                       {.label_smoothing = 0.1}, DType::f64, kCpu);
}

TEST_CASE("what does not split over a tensor group says what would") {
  const auto refusal = [](const std::string& yaml) {
    return error_of([&] { Decoder(config_of(yaml, 30), 8, Parallel{world()}); });
  };
  const int n = world()->size();
  if (n == 4) {
    CHECK(refusal("layers: [attention], attention: {n_heads: 6, rope: false}, mlp: {type: gelu}") ==
          "model.attention.n_heads: 6 heads do not split over 4 processes (parallelism.tensor); set parallelism.tensor to "
          "2, 3 or 6, or change model.attention.n_heads");
  }
  CHECK(contains(refusal("layers: [attention], attention: {n_heads: 3}, mlp: {type: gelu}"), "model.attention.n_heads: 3 heads"));
  CHECK(contains(refusal("layers: [attention], attention: {n_heads: 30, n_kv_heads: 3, rope: false}, mlp: {type: gelu}"),
                 n == 2 ? "model.attention.n_kv_heads: 3 key/value heads" : "model.attention.n_heads"));
  CHECK(contains(refusal("layers: [attention], attention: {n_heads: 1}, mlp: {type: gelu, hidden: 31}"),
                 "do not split over"));
}

TEST_CASE("cuda: layers and models over a tensor group equal one rank's", "[cuda]") {
  const Device device = comm::local_cuda_device();
  for (const Family& f : kFamilies) {
    for (const bool packed : {false, true}) check_family(f, DType::f64, device, packed);
    check_family(f, DType::f64, device, false, 0.25);
  }
  for (const std::string& yaml : kModels)
    check_language_model(yaml, {.label_smoothing = 0.1, .z_loss = 1e-3}, DType::f64, device);
}

}  // namespace krait::layers
