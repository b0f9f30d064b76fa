#include "layers/model_config.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "layers/kan.h"
#include "layers/registry.h"
#include "layers/xlstm_init.h"

namespace krait::layers {

double ModelConfig::residual_std() const {
  return init == "xlstm" ? wang_std(n_layers, d_model) : init_std / std::sqrt(2.0 * static_cast<double>(n_layers));
}

const ConfigNode& ModelConfig::options_of(const std::string& kind) const {
  const ConfigNode* options = section.find(kind);
  KRAIT_ASSERT(options, "model.{} was not read", kind);
  return *options;
}

namespace {

// xlstm[a:b] (Beck et al. 2024): a period of a mLSTM and b sLSTM layers, the sLSTM at offsets 1 ... b.
// Other entries stay. The items of the section are expanded too and keep their places.
void expand_patterns(ConfigNode& layers, std::vector<std::string>& pattern) {
  std::vector<std::string> names;
  ConfigNode list = ConfigNode::list();
  for (size_t i = 0; i < pattern.size(); ++i) {
    const ConfigNode& item = layers.items().at(i);
    const auto add = [&](const std::string& name) {
      names.push_back(name);
      list.append(ConfigNode::of(name)).set_mark(item.mark());
    };
    if (!pattern[i].starts_with("xlstm")) {
      add(pattern[i]);
      continue;
    }
    int a = 0, b = 0, end = 0;
    const bool read = std::sscanf(pattern[i].c_str(), "xlstm[%3d:%3d]%n", &a, &b, &end) == 2;
    if (!read || end != static_cast<int>(pattern[i].size()) || a < 0 || b < 0 || a + b == 0)
      item.fail(fmt::format("found '{}', expected xlstm[a:b]: a mLSTM layers to b sLSTM layers", item.shown()),
                "xlstm[7:1]");
    const int first = a == 0 ? 0 : 1;
    for (int k = 0; k < a + b; ++k) add(k >= first && k < first + b ? "slstm" : "mlstm");
  }
  if (names == pattern) return;
  list.set_mark(layers.mark());
  list.set_path(layers.path());
  list.set_default(layers.is_default());
  layers = std::move(list);
  pattern = std::move(names);
}

void check_layer_names(const ConfigNode& layers, const std::vector<std::string>& pattern) {
  if (pattern.empty()) layers.fail("found an empty list, expected at least one layer name");
  std::vector<std::string> names;
  for (const LayerKind& kind : layer_kinds()) names.push_back(kind.name);
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (std::find(names.begin(), names.end(), pattern[i]) != names.end()) continue;
    std::string known;
    for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
    const ConfigNode& item = layers.items().at(i);
    item.fail(fmt::format("found '{}', expected a layer name: {}", item.shown(), known), nearest_name(pattern[i], names));
  }
}

bool is_kan_network(const ConfigNode& section) {
  const ConfigNode* layers = section.find("layers");
  if (!layers) return false;
  if (layers->is_list()) return layers->items().size() == 1 && layers->items()[0].is_scalar() && layers->items()[0].text() == "kan";
  return layers->is_scalar() && layers->text() == "kan";
}

// A network of KAN layers has no blocks, no width of its own and no tokens.
void read_kan_network(OptionReader& options, ModelConfig& c) {
  options.read("layers", c.layers);
  if (c.type == "language_model")
    options.fail("layers", "found [kan], a network for inputs of a fixed size, but type is language_model",
                 "type: regressor, or mlp: {type: kan} with a layer that mixes along the sequence");
  kan_kind().read_options(options.section("kan"), c);
  c.d_model = c.n_layers = 0;
  options.read("n_classes", c.n_classes, between(0, 0x7FFFFFFF));
}

}  // namespace

ModelConfig read_model_config(ConfigNode& section) {
  ModelConfig c;
  OptionReader options(section);
  options.choice("type", c.type, {"language_model", "classifier", "regressor"});
  if (is_kan_network(section)) {
    read_kan_network(options, c);
    options.finish();
    c.section = section;
    return c;
  }
  options.require("d_model");
  options.read("d_model", c.d_model, between(1, 1 << 20));
  options.require("n_layers");
  options.read("n_layers", c.n_layers, between(1, 100'000));
  options.read("vocab_size", c.vocab_size, between(0, 0x7FFFFFFF));
  options.read("pad_vocab_multiple", c.pad_vocab_multiple, between(1, 65536));
  options.read("dropout", c.dropout, below_one());  // before the layers, which default to it
  options.read("layers", c.layers);
  expand_patterns(*section.find("layers"), c.layers);
  check_layer_names(*section.find("layers"), c.layers);
  if (std::find(c.layers.begin(), c.layers.end(), "kan") != c.layers.end())
    options.fail("layers", "kan is a network of its own and does not mix along a sequence", "mlp: {type: kan}");
  if (static_cast<int64_t>(c.layers.size()) > c.n_layers) {
    options.fail("layers", fmt::format("a pattern of {} layers does not fit into n_layers {}", c.layers.size(), c.n_layers));
  }
  for (const LayerKind& kind : layer_kinds()) {
    const bool used = std::find(c.layers.begin(), c.layers.end(), kind.name) != c.layers.end();
    // Options of a kind that the pattern does not use are checked too, but need not be there.
    ConfigNode* own = used ? &options.section(kind.name) : options.find_section(kind.name);
    if (own) kind.read_options(*own, c);
  }
  c.mlp = read_mlp_config(options.section("mlp"), c.d_model);
  options.choice("norm", c.norm, {"rms", "layer", "layer_1p"});
  options.read("norm_eps", c.norm_eps, above(0));
  options.choice("norm_position", c.norm_position, {"pre", "post"});
  options.choice("position", c.position, {"none", "learned"});
  options.read("max_positions", c.max_positions, between(0, 0x7FFFFFFF));
  options.read("tie_embeddings", c.tie_embeddings);
  if (!options.given("embedding_dropout")) c.embedding_dropout = c.dropout;
  options.read("embedding_dropout", c.embedding_dropout, below_one());
  options.choice("init", c.init, {"gpt2", "llama", "xlstm"});
  if (c.init == "xlstm") c.init_std = small_std(c.d_model);
  options.read("init_std", c.init_std, above(0));
  options.read("logit_cap", c.logit_cap, at_least(0));
  options.choice("head", c.head, {"last", "pooled"});
  options.read("n_classes", c.n_classes, between(0, 0x7FFFFFFF));
  options.finish();
  if (c.type != "language_model" && c.logit_cap > 0)
    options.fail("logit_cap", fmt::format("found {}, but only a language model caps its logits, and type is {}",
                                          c.logit_cap, c.type), "0");
  if (c.type != "language_model" && c.position != "none") {
    options.fail("position", fmt::format("found {}, but a {} has no position embedding", c.position, c.type),
                 "position: none, with rope or a recurrent layer");
  }
  c.section = section;
  return c;
}

}  // namespace krait::layers
