#include <cmath>

#include "autograd/elementwise.h"
#include "core/random.h"
#include "layers/attention_config.h"
#include "layers/model.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

struct Variant {
  std::string name;
  bool rope = true, alibi = false, learned = false;
  int64_t window = 0, kv_heads = 2;
  std::string mlp = "swiglu", norm = "rms";
  bool qk_norm = false;
  double dropout = 0, attention_dropout = -1;  // -1: not given
};
const std::vector<Variant> kVariants{{"llama"},
                                     {.name = "gpt2", .rope = false, .learned = true, .kv_heads = 4, .mlp = "gelu_tanh", .norm = "layer"},
                                     {.name = "window", .window = 5},
                                     {.name = "alibi", .rope = false, .alibi = true, .kv_heads = 1, .mlp = "relu2"},
                                     {.name = "qk_norm", .mlp = "silu", .qk_norm = true}};

ModelConfig config_of(const Variant& v) {
  ConfigNode section = ConfigNode::map();
  section.set("d_model", ConfigNode::of(int64_t{32}));
  section.set("n_layers", ConfigNode::of(int64_t{2}));
  section.set("norm", ConfigNode::of(v.norm));
  section.set("position", ConfigNode::of(std::string(v.learned ? "learned" : "none")));
  section.set("max_positions", ConfigNode::of(int64_t{64}));
  section.set("pad_vocab_multiple", ConfigNode::of(int64_t{8}));
  section.set("dropout", ConfigNode::of(v.dropout));
  ConfigNode attention = ConfigNode::map();
  attention.set("n_heads", ConfigNode::of(int64_t{4}));
  attention.set("n_kv_heads", ConfigNode::of(v.kv_heads));
  attention.set("rope", ConfigNode::of(v.rope));
  attention.set("alibi", ConfigNode::of(v.alibi));
  attention.set("window", ConfigNode::of(v.window));
  attention.set("qk_norm", ConfigNode::of(v.qk_norm));
  if (v.attention_dropout >= 0) attention.set("dropout", ConfigNode::of(v.attention_dropout));
  section.set("attention", attention);
  ConfigNode mlp = ConfigNode::map();
  mlp.set("type", ConfigNode::of(v.mlp));
  section.set("mlp", mlp);
  return read_model_config(section);
}

constexpr int64_t kVocab = 29, kLength = 17;

struct TestModel {
  explicit TestModel(const ModelConfig& config, Device device = kCpu, DType compute = DType::f64)
      : model(config, {.vocab_size = kVocab, .context = kLength}),
        store(model, {.device = device, .master = compute == DType::f64 ? DType::f64 : DType::f32,
                      .compute = compute, .seed = 5}) {
    // Larger weights than at the start of training, so that attention is far from uniform.
    Tensor scale = full({}, 6.0, store.master().dtype(), device).expand(store.master().shape());
    Variable product = Variable(store.master()) * Variable(scale);
    copy_(store.master(), product.data());
    store.refresh_compute();
  }
  LanguageModel model;
  ParameterStore store;
};

ModelInput random_input(int64_t b, int64_t l, uint64_t seed) {
  ModelInput input;
  input.tokens = random_integers({b, l}, {0, kVocab}, seed);
  input.targets = random_integers({b, l}, {0, kVocab}, seed + 1);
  return input;
}

// The source of random numbers while a test runs.
struct Source {
  explicit Source(int64_t step, Device device = kCpu, int64_t batch_offset = 0) {
    current_random() = {7, from_vector<int64_t>({step}).view({}).to(device), batch_offset};
  }
  ~Source() { current_random() = {}; }
};

}  // namespace

TEST_CASE("chunks with a cache give the logits of the whole sequence, and so do single steps") {
  for (const Variant& v : kVariants) {
    INFO(v.name);
    TestModel t(config_of(v));
    const ModelInput input = random_input(2, kLength, 11);
    const NoGrad guard;
    const Tensor whole = t.model.logits(input).data();
    for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{1, 3, 8, 5}, std::vector<int64_t>(kLength, 1)}) {
      DecoderState state = t.model.initial_state(2, kLength, t.store.options());
      int64_t at = 0;
      for (const int64_t n : cuts) {
        const Tensor last = t.model.next_logits(input.tokens.slice(1, at, at + n), state);
        at += n;
        CHECK(relative_error(last, whole.select(1, at - 1)) < 1e-10);
      }
      CHECK(state.length == kLength);
    }
  }
}

TEST_CASE("a full cache says what to raise") {
  TestModel t(config_of(kVariants[0]));
  DecoderState state = t.model.initial_state(1, 4, t.store.options());
  const std::string message = error_of([&] { t.model.next_logits(random_input(1, 5, 3).tokens, state); });
  CHECK(contains(message, "the key/value cache holds 4 positions, 5 are needed"));
}

TEST_CASE("documents packed into one row give the losses and gradients of the documents apart") {
  for (const Variant& v : kVariants) {
    INFO(v.name);
    const std::vector<int64_t> lengths{6, 1, 10};
    const ModelInput packed = [&] {
      ModelInput input = random_input(1, kLength, 21);
      std::vector<int32_t> segments, positions;
      for (size_t d = 0; d < lengths.size(); ++d)
        for (int64_t i = 0; i < lengths[d]; ++i) {
          segments.push_back(static_cast<int32_t>(d));
          positions.push_back(static_cast<int32_t>(i));
        }
      input.info.segments = from_vector(segments, {1, kLength});
      input.info.positions = from_vector(positions, {1, kLength});
      return input;
    }();
    TestModel together(config_of(v)), apart(config_of(v));
    const Tensor count = full({}, kLength, DType::f32, kCpu);
    const ModelLoss one = together.model.loss(packed, count);
    backward(one.loss);
    double sum = 0;
    int64_t at = 0;
    for (const int64_t n : lengths) {
      ModelInput piece;
      piece.tokens = packed.tokens.slice(1, at, at + n);
      piece.targets = packed.targets.slice(1, at, at + n);
      const ModelLoss part = apart.model.loss(piece, count);
      backward(part.loss);
      sum += part.loss.data().item();
      at += n;
    }
    CHECK(one.loss.data().item() == Approx(sum).epsilon(1e-12));
    CHECK(relative_error(together.store.grad(), apart.store.grad()) < 1e-10);
  }
}

TEST_CASE("recomputing blocks changes neither loss nor gradients") {
  const Variant& v = kVariants[1];
  TestModel plain(config_of(v)), again(config_of(v));
  again.model.decoder().set_recompute(true);
  const ModelInput input = random_input(3, kLength, 31);
  const ModelLoss a = plain.model.loss(input, {}), b = again.model.loss(input, {});
  CHECK(a.loss.data().item() == b.loss.data().item());
  backward(a.loss);
  backward(b.loss);
  CHECK(relative_error(again.store.grad(), plain.store.grad()) == 0.0);
}

TEST_CASE("attention.dropout defaults to the model's, and the complete section shows it") {
  const auto resolved = [](const Variant& v) {
    ConfigNode section = config_of(v).options_of("attention");
    const double shown = std::stod(section.find("dropout")->text());
    CHECK(read_attention_config(section, 32).dropout == shown);
    return shown;
  };
  CHECK(resolved({.name = "none"}) == 0.0);
  CHECK(resolved({.name = "model", .dropout = 0.2}) == 0.2);
  CHECK(resolved({.name = "own", .dropout = 0.2, .attention_dropout = 0.0}) == 0.0);
  CHECK(contains(error_of([&] { resolved({.name = "all", .attention_dropout = 1.0}); }), "expected a number in [0, 1)"));
}

TEST_CASE("attention drops probabilities in training only, anew at each step") {
  const Variant v{.name = "drop", .attention_dropout = 0.5};
  TestModel plain(config_of({.name = "plain"})), drop(config_of(v));
  const ModelInput input = random_input(3, kLength, 31);
  const auto loss = [&](TestModel& t) { return t.model.loss(input, {}).loss.data().item(); };
  const double expected = loss(plain);
  drop.model.set_training(true);
  {
    const Source source(4);
    const double once = loss(drop);
    CHECK(std::abs(once - expected) > 1e-6);
    CHECK(loss(drop) == once);
    current_random().step = from_vector<int64_t>({5}).view({});
    CHECK(loss(drop) != once);
  }
  drop.model.set_training(false);  // needs no random numbers
  CHECK(loss(drop) == expected);
  drop.model.set_training(true);  // a cache is not for training
  DecoderState state = drop.model.initial_state(3, kLength, drop.store.options());
  drop.model.next_logits(input.tokens, state);
}

TEST_CASE("recomputing blocks with dropout draws the same masks again") {
  const Source source(9);
  const Variant v{.name = "drop", .dropout = 0.2};
  TestModel plain(config_of(v)), again(config_of(v));
  for (TestModel* t : {&plain, &again}) t->model.set_training(true);
  again.model.decoder().set_recompute(true);
  const ModelInput input = random_input(3, kLength, 31);
  const ModelLoss a = plain.model.loss(input, {}), b = again.model.loss(input, {});
  CHECK(a.loss.data().item() == b.loss.data().item());
  backward(a.loss);
  backward(b.loss);
  CHECK(relative_error(again.store.grad(), plain.store.grad()) == 0.0);
}

TEST_CASE("a sequence is dropped from alike in any micro-batch") {
  const Variant v{.name = "drop", .dropout = 0.2};
  TestModel t(config_of(v));
  t.model.set_training(true);
  const ModelInput input = random_input(4, kLength, 41);
  const auto logits = [&](int64_t first, int64_t last) {
    const Source source(2, kCpu, first);
    ModelInput part;
    part.tokens = input.tokens.slice(0, first, last);
    return t.model.logits(part).data();
  };
  CHECK(relative_error(logits(1, 3), logits(0, 4).slice(0, 1, 3)) < 1e-12);
}

TEST_CASE("micro-batches with the count of the whole batch add up to its gradient") {
  TestModel whole(config_of(kVariants[0])), parts(config_of(kVariants[0]));
  ModelInput input = random_input(4, kLength, 41);
  for (int64_t i = 0; i < 23; ++i) input.targets.data<int64_t>()[i] = -100;  // uneven over the micro-batches
  const ModelLoss all = whole.model.loss(input, {});
  backward(all.loss);
  CHECK(all.count.item() == 4 * kLength - 23);
  double sum = 0;
  for (int64_t i = 0; i < 4; i += 2) {
    ModelInput half;
    half.tokens = input.tokens.slice(0, i, i + 2);
    half.targets = input.targets.slice(0, i, i + 2);
    const ModelLoss part = parts.model.loss(half, full({}, 4 * kLength - 23, DType::f32, kCpu));
    backward(part.loss);
    sum += part.loss.data().item();
  }
  CHECK(sum == Approx(all.loss.data().item()).epsilon(1e-12));
  CHECK(relative_error(parts.store.grad(), whole.store.grad()) < 1e-12);
}

TEST_CASE("padded vocabulary columns take no probability and get no gradient") {
  TestModel t(config_of(kVariants[0]));
  const ModelInput input = random_input(2, kLength, 51);
  CHECK(t.model.logits(input).data().size(-1) == kVocab);
  backward(t.model.loss(input, {}).loss);
  for (const auto& [name, grad] : t.store.named_grads()) {
    if (name != "embedding.weight") continue;
    CHECK(grad.size(0) == 32);
    CHECK(relative_error(grad.slice(0, kVocab, 32), zeros({3, 32}, DType::f64, kCpu)) == 0.0);
  }
}

TEST_CASE("token_nll is the loss per token, and continues from a state") {
  TestModel t(config_of(kVariants[0]));
  const ModelInput input = random_input(2, kLength, 61);
  const Tensor nll = t.model.token_nll(input);
  double sum = 0;
  for (const double x : nll.to_vector<double>()) sum += x;
  CHECK(sum == Approx(t.model.loss(input, {}).loss_sum.item()).epsilon(1e-9));
  DecoderState state = t.model.initial_state(2, kLength, t.store.options());
  int64_t at = 0;
  for (const int64_t n : {7, 10}) {
    ModelInput piece;
    piece.tokens = input.tokens.slice(1, at, at + n);
    piece.targets = input.targets.slice(1, at, at + n);
    piece.state = &state;
    CHECK(relative_error(t.model.token_nll(piece), nll.slice(1, at, at + n)) < 1e-9);
    at += n;
  }
}

TEST_CASE("a model that does not learn holds no gradients and gives the same losses") {
  const ModelConfig c = config_of(kVariants[0]);
  const ModelInput input = random_input(2, kLength, 62);
  for (const DType compute : {DType::f32, DType::bf16}) {
    LanguageModel learns(c, {.vocab_size = kVocab, .context = kLength}), reads(c, {.vocab_size = kVocab, .context = kLength});
    ParameterStore with(learns, {.compute = compute, .seed = 5}), without(reads, {.compute = compute, .seed = 5, .gradients = false});
    CHECK(with.grad().defined());
    CHECK_FALSE(without.grad().defined());
    CHECK(relative_error(reads.token_nll(input), learns.token_nll(input)) == 0.0);
    CHECK_FALSE(reads.loss(input, {}).loss.requires_grad());
  }
}

TEST_CASE("initial values follow the seed and the name: residual projections are scaled by depth") {
  const ModelConfig c = config_of(kVariants[0]);
  const auto std_of = [](const Tensor& t) {
    double sum = 0;
    for (const double x : t.to_vector<double>()) sum += x * x;
    return std::sqrt(sum / static_cast<double>(t.numel()));
  };
  LanguageModel a(c, {.vocab_size = kVocab, .context = kLength}), b(c, {.vocab_size = kVocab, .context = kLength});
  ParameterStore first(a, {.seed = 5}), second(b, {.seed = 6});
  CHECK(std_of(first.named_master("layers.0.wq.weight")) == Approx(0.02).epsilon(0.1));
  CHECK(std_of(first.named_master("layers.1.wo.weight")) == Approx(0.01).epsilon(0.1));
  CHECK(std_of(first.named_master("layers.1.down.weight")) == Approx(0.01).epsilon(0.1));
  CHECK(relative_error(first.named_master("norm_f.weight"), ones({32}, DType::f64, kCpu)) == 0.0);
  CHECK(relative_error(first.master(), second.master()) > 0.1);
  CHECK(contains(error_of([&] { first.named_master("layers.0.wq"); }), "no parameter is named layers.0.wq"));
}

TEST_CASE("a classifier and a regressor pass gradients from pooled and last positions") {
  for (const std::string type : {"classifier", "regressor"})
    for (const std::string head : {"pooled", "last"}) {
      INFO(type << " " << head);
      ModelConfig c = config_of(kVariants[0]);
      c.type = type;
      c.head = head;
      c.n_classes = 3;
      SequenceModel model(c, {.input_features = 2, .context = kLength});
      ParameterStore store(model, {.master = DType::f64, .compute = DType::f64, .seed = 9});
      ModelInput input;
      input.inputs = random_tensor({4, kLength, 2}, Normal{}, 71);
      input.targets = type == "classifier" ? random_integers({4}, {0, 3}, 72) : random_tensor({4, 3}, Normal{}, 72);
      const auto loss_at = [&] { return model.loss(input, {}); };
      const ModelLoss at = loss_at();
      backward(at.loss);
      CHECK(at.count.item() == 4);
      // One gradient by finite differences, through the whole model.
      Tensor w = store.named_master("encoder.weight");
      double* p = w.data<double>();
      const double h = 1e-6, analytic = store.named_grads()[0].value.to_vector<double>()[1], old = p[1];
      REQUIRE(store.named_grads()[0].name == "encoder.weight");
      p[1] = old + h;
      const double up = loss_at().loss.data().item();
      p[1] = old - h;
      const double down = loss_at().loss.data().item();
      p[1] = old;
      CHECK(analytic == Approx((up - down) / (2 * h)).epsilon(1e-5).margin(1e-9));
    }
}

TEST_CASE("a classifier and a regressor drop from the embedding of tokens, in training only") {
  for (const std::string type : {"classifier", "regressor"}) {
    INFO(type);
    const auto loss = [&](double p, bool training, int64_t step) {
      const Source source(step);
      ModelConfig c = config_of(kVariants[0]);
      c.type = type;
      c.head = "pooled";
      c.n_classes = 3;
      c.embedding_dropout = p;
      SequenceModel model(c, {.vocab_size = kVocab, .context = kLength});
      ParameterStore store(model, {.master = DType::f64, .compute = DType::f64, .seed = 9});
      model.set_training(training);
      ModelInput input;
      input.tokens = random_integers({4, kLength}, {0, kVocab}, 81);
      input.targets = type == "classifier" ? random_integers({4}, {0, 3}, 72) : random_tensor({4, 3}, Normal{}, 72);
      return model.loss(input, {}).loss.data().item();
    };
    const double plain = loss(0, true, 4), dropped = loss(0.5, true, 4);
    CHECK(std::abs(dropped - plain) > 1e-6);
    CHECK(loss(0.5, true, 4) == dropped);
    CHECK(loss(0.5, true, 5) != dropped);
    CHECK(loss(0.5, false, 4) == plain);
  }
}

TEST_CASE("a classifier's label smoothing and z-loss are in its loss, and not in what is reported") {
  ModelConfig c = config_of(kVariants[0]);
  c.type = "classifier";
  c.n_classes = 3;
  const CrossEntropyOptions options{.label_smoothing = 0.2, .z_loss = 0.05};
  const auto plain = make_model(c, {.input_features = 2, .context = kLength}), smooth = make_model(c, {.input_features = 2, .context = kLength}, options);
  ParameterStore plain_store(*plain, {.master = DType::f64, .compute = DType::f64, .seed = 9});
  ParameterStore smooth_store(*smooth, {.master = DType::f64, .compute = DType::f64, .seed = 9});
  ModelInput input;
  input.inputs = random_tensor({4, kLength, 2}, Normal{.std = 20}, 71);
  input.targets = random_integers({4}, {0, 3}, 72);
  const ModelLoss a = plain->loss(input, {}), b = smooth->loss(input, {});
  const std::vector<double> s = plain->predict(input).data().to_vector<double>();
  double wanted = 0, nll = 0;
  for (int64_t row = 0; row < 4; ++row) {
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < 3; ++j) {
      sum += std::exp(s[static_cast<size_t>(3 * row + j)]);
      mean += s[static_cast<size_t>(3 * row + j)] / 3;
    }
    const double lse = std::log(sum), own = lse - s[static_cast<size_t>(3 * row + input.targets.to_vector<int64_t>()[static_cast<size_t>(row)])];
    nll += own;
    wanted += 0.8 * own + 0.2 * (lse - mean) + 0.05 * lse * lse;
  }
  CHECK(b.loss.data().item() == Approx(wanted / 4));
  CHECK(b.loss_sum.item() == Approx(nll));
  CHECK(a.loss.data().item() == Approx(nll / 4));
  backward(a.loss);
  backward(b.loss);
  CHECK(relative_error(plain_store.grad(), smooth_store.grad()) > 1e-3);
}

TEST_CASE("cuda: with dropout the loss and gradients equal the cpu's", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    INFO(name_of(dtype));
    const Variant v{.name = "drop", .dropout = 0.2};
    TestModel cpu(config_of(v), kCpu, dtype), gpu(config_of(v), cuda_device(), dtype);
    const ModelInput input = random_input(3, kLength, 81);
    ModelInput there = input;
    there.tokens = input.tokens.to(cuda_device());
    there.targets = input.targets.to(cuda_device());
    const auto run = [](TestModel& t, const ModelInput& in, Device device) {
      const Source source(3, device);
      t.model.set_training(true);
      const Variable loss = t.model.loss(in, {}).loss;
      backward(loss);
      return loss.data();
    };
    const Tensor a = run(cpu, input, kCpu), b = run(gpu, there, cuda_device());
    const double tolerance = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 2e-4 : 0.1;
    CHECK(relative_error(b, a) <= tolerance);
    CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) <= tolerance);
  }
}

TEST_CASE("cuda: the language model's loss and gradients equal the cpu's", "[cuda]") {
  for (const Variant& v : kVariants)
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(v.name << " " << name_of(dtype));
      TestModel cpu(config_of(v), kCpu, dtype), gpu(config_of(v), cuda_device(), dtype);
      const ModelInput input = random_input(3, kLength, 81);
      ModelInput there = input;
      there.tokens = input.tokens.to(cuda_device());
      there.targets = input.targets.to(cuda_device());
      const ModelLoss a = cpu.model.loss(input, {}), b = gpu.model.loss(there, {});
      backward(a.loss);
      backward(b.loss);
      const double tolerance = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 2e-4 : 0.1;
      CHECK(relative_error(b.loss.data(), a.loss.data()) <= tolerance);
      CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) <= tolerance);
    }
}

}  // namespace krait::layers
