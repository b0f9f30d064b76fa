#include <map>

#include "autograd/cross_entropy.h"
#include "autograd/elementwise.h"
#include "layers/attention.h"
#include "layers/mlp.h"
#include "layers/model.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

StoreOptions store_options(DType dtype) {
  return {.device = kCpu, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype, .seed = 1};
}

// Golden parameters under our names; `rename` maps ours to the golden's.
template <class Rename>
void load(ParameterStore& store, const GoldenCase& golden, Rename rename) {
  for (auto& [name, value] : store.named_masters()) copy_(value, golden.tensor("param/" + rename(name)));
  store.refresh_compute();
}

template <class Rename>
void check_grads(ParameterStore& store, const GoldenCase& golden, DType dtype, Rename rename) {
  for (const auto& [name, grad] : store.named_grads()) {
    const std::string path = "grad/param/" + rename(name);
    golden.check_within(path, grad, golden.tolerance(path, dtype));
  }
}

std::string same(const std::string& name) { return name; }

// A module with one block, so that parameters have the names of the golden.
template <class Make>
void check_module(const GoldenCase& golden, DType dtype, Make make) {
  INFO(golden.name() << " " << name_of(dtype));
  auto [module, forward] = make();
  ParameterStore store(*module, store_options(dtype));
  load(store, golden, same);
  const Variable x(golden.tensor("in/x").to(dtype), true);
  const Variable y = forward(x);
  golden.check_within("out/y", y.data(), golden.tolerance("out/y", dtype));
  backward(y, golden.tensor("upstream/y").to(dtype));
  golden.check_within("grad/in/x", x.grad(), golden.tolerance("grad/in/x", dtype));
  check_grads(store, golden, dtype, same);
}

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16};

LayerContext context_of(int64_t d_model) {
  LayerContext c;
  c.d_model = d_model;
  c.residual_std = 0.02;
  return c;
}

}  // namespace

TEST_CASE("a decoder block meets its goldens in fp64, fp32 and bf16") {
  for_each_golden("transformer.h5", "decoder_block_", [](const GoldenCase& golden) {
    for (const DType dtype : kTypes)
      check_module(golden, dtype, [&] {
        const auto d = static_cast<int64_t>(golden.number("M"));
        LayerContext context = context_of(d);
        AttentionConfig a;
        a.n_heads = static_cast<int64_t>(golden.number("Hq"));
        a.n_kv_heads = static_cast<int64_t>(golden.number("Hkv"));
        a.head_dim = a.rotary_dim = static_cast<int64_t>(golden.number("d"));
        a.rope_base = golden.number("theta");
        a.window = static_cast<int64_t>(golden.find_number("window").value_or(0));
        MlpConfig m;
        m.type = "swiglu";
        m.hidden = static_cast<int64_t>(golden.number("F"));
        auto block = std::make_shared<Block>(std::make_shared<Attention>(a, context), make_mlp(m, context),
                                             NormConfig{"rms", golden.number("eps")}, context);
        return std::pair(block, [block](const Variable& x) {
          const ResidualStream out = block->forward({x, {}}, {}, nullptr);
          return out.residual + out.pending;
        });
      });
  });
}

TEST_CASE("SwiGLU and GELU MLPs meet their goldens") {
  for (const std::string type : {"swiglu", "gelu"})
    for_each_golden("transformer.h5", type + "_mlp", [&](const GoldenCase& golden) {
      for (const DType dtype : kTypes)
        check_module(golden, dtype, [&] {
          const LayerContext context = context_of(golden.tensor("in/x").size(-1));
          MlpConfig m;
          m.type = type == "gelu" ? "gelu_tanh" : type;
          m.bias = type == "gelu";
          m.hidden = golden.tensor(type == "gelu" ? "param/fc.weight" : "param/up.weight").size(0);
          auto mlp = make_mlp(m, context);
          return std::pair(mlp, [mlp](const Variable& x) { return mlp->forward(x); });
        });
    });
}

namespace {

template <class Rename>
void check_language_model(const GoldenCase& golden, DType dtype, const ModelConfig& config, Rename rename) {
  INFO(golden.name() << " " << name_of(dtype));
  ModelShape shape;
  shape.vocab_size = static_cast<int64_t>(golden.number("V"));
  shape.context = golden.tensor("in/tokens").size(1);
  LanguageModel model(config, shape);
  ParameterStore store(model, store_options(dtype));
  load(store, golden, rename);
  ModelInput input;
  input.tokens = golden.tensor("in/tokens");
  input.targets = golden.tensor("in/targets");
  golden.check_within("out/logits", model.logits(input).data(), golden.tolerance("out/logits", dtype));

  // The golden's objective is loss + sum of upstream * logits where both have an upstream.
  REQUIRE(golden.has("upstream/loss"));
  const ModelLoss loss = model.loss(input, {});
  golden.check_within("out/loss", loss.loss.data(), golden.tolerance("out/loss", dtype));
  backward(loss.loss);
  if (golden.has("upstream/logits")) backward(model.logits(input), golden.tensor("upstream/logits").to(dtype));
  check_grads(store, golden, dtype, rename);
}

ConfigNode attention_section(int64_t heads, int64_t kv_heads, bool rope, bool bias) {
  ConfigNode attention = ConfigNode::map();
  attention.set("n_heads", ConfigNode::of(heads));
  attention.set("n_kv_heads", ConfigNode::of(kv_heads));
  attention.set("rope", ConfigNode::of(rope));
  attention.set("bias", ConfigNode::of(bias));
  ConfigNode section = ConfigNode::map();
  section.set("attention", attention);
  return section;
}

}  // namespace

TEST_CASE("the Llama-style language model meets its golden: logits, loss, every gradient") {
  for_each_golden("transformer.h5", "llama_lm", [](const GoldenCase& golden) {
    ModelConfig c;
    c.d_model = static_cast<int64_t>(golden.number("M"));
    c.n_layers = static_cast<int64_t>(golden.number("n_layer"));
    c.norm_eps = golden.number("eps");
    c.tie_embeddings = false;
    c.mlp.type = "swiglu";
    c.mlp.hidden = static_cast<int64_t>(golden.number("F"));
    c.section = attention_section(static_cast<int64_t>(golden.number("Hq")),
                                  static_cast<int64_t>(golden.number("Hkv")), true, false);
    for (const DType dtype : kTypes) check_language_model(golden, dtype, c, same);
  });
}

TEST_CASE("the GPT-2-style language model meets its golden: logits, loss, every gradient") {
  for_each_golden("transformer.h5", "gpt2_lm", [](const GoldenCase& golden) {
    const auto d = static_cast<int64_t>(golden.number("M"));
    ModelConfig c;
    c.d_model = d;
    c.n_layers = static_cast<int64_t>(golden.number("n_layer"));
    c.norm = "layer";
    c.norm_eps = golden.number("eps");
    c.position = "learned";
    c.max_positions = golden.tensor("param/wpe.weight").size(0);
    c.mlp.type = "gelu_tanh";
    c.mlp.bias = true;
    c.mlp.hidden = 4 * d;
    c.section = attention_section(static_cast<int64_t>(golden.number("H")), static_cast<int64_t>(golden.number("H")),
                                  false, true);
    for (const DType dtype : kTypes) {
      INFO(name_of(dtype));
      ModelShape shape;
      shape.vocab_size = static_cast<int64_t>(golden.number("V"));
      shape.context = golden.tensor("in/tokens").size(1);
      LanguageModel model(c, shape);
      ParameterStore store(model, store_options(dtype));
      // Ours to GPT-2's; q, k and v are rows of c_attn.
      const auto pick = [&](const std::string& ours, const std::string& group) {
        const auto get = [&](const std::string& name) { return golden.tensor(group + name); };
        if (ours == "embedding.weight") return std::pair(get("wte.weight"), group + "wte.weight");
        if (ours == "position_embedding.weight") return std::pair(get("wpe.weight"), group + "wpe.weight");
        if (ours.starts_with("norm_f.")) return std::pair(get("ln_f" + ours.substr(6)), group + "ln_f" + ours.substr(6));
        const size_t dot = ours.find('.', 7);
        const std::string layer = "h." + ours.substr(7, dot - 7) + ".", rest = ours.substr(dot + 1);
        const std::string kind = rest.substr(rest.find('.'));  // ".weight" or ".bias"
        if (rest[0] == 'w' && rest[1] != 'o') {
          const std::string name = layer + "c_attn" + kind;
          const int64_t at = rest[1] == 'q' ? 0 : rest[1] == 'k' ? 1 : 2;
          return std::pair(get(name).slice(0, at * d, (at + 1) * d), group + name);
        }
        const std::string name = layer + (rest.starts_with("wo") ? "attn_proj" : rest.starts_with("attn_norm") ? "ln_1"
                                          : rest.starts_with("mlp_norm") ? "ln_2" : rest.substr(0, rest.find('.'))) + kind;
        return std::pair(get(name), group + name);
      };
      for (auto& [name, value] : store.named_masters()) copy_(value, pick(name, "param/").first);
      store.refresh_compute();
      ModelInput input;
      input.tokens = golden.tensor("in/tokens");
      input.targets = golden.tensor("in/targets");
      golden.check_within("out/logits", model.logits(input).data(), golden.tolerance("out/logits", dtype));
      const ModelLoss loss = model.loss(input, {});
      golden.check_within("out/loss", loss.loss.data(), golden.tolerance("out/loss", dtype));
      backward(loss.loss);
      if (golden.has("upstream/logits")) backward(model.logits(input), golden.tensor("upstream/logits").to(dtype));
      // Compared per data set of the golden: the key bias alone has a gradient of exactly zero.
      std::map<std::string, Tensor> ours;
      for (const auto& [name, grad] : store.named_grads()) {
        const auto [rows, path] = pick(name, "grad/param/");
        const Tensor whole = golden.tensor(path);
        auto [it, fresh] = ours.try_emplace(path, zeros(whole.shape(), DType::f64, kCpu));
        Tensor target = it->second.slice(0, rows.offset() / std::max<int64_t>(1, rows.stride(0)),
                                         rows.offset() / std::max<int64_t>(1, rows.stride(0)) + rows.size(0));
        copy_(target, grad);
      }
      for (const auto& [path, grad] : ours) golden.check_within(path, grad, golden.tolerance(path, dtype));
    }
  });
}

}  // namespace krait::layers
