#include "layers/module.h"

#include <unordered_set>

#include "layers/random_values.h"

namespace krait::layers {

Initializer normal(double std, double mean) {
  return RandomValues{fill_normal_, mean, std};
}
Initializer uniform(double low, double high) {
  return RandomValues{fill_uniform_, low, high};
}
Initializer constant(double v) {
  return [=](Tensor& value, uint64_t) { fill_(value, v); };
}

const Variable& Parameter::variable() const {
  if (data_ && data_->before_use) data_->before_use();
  KRAIT_ASSERT(data_ && data_->value.defined(), "a parameter is used before a ParameterStore holds its module.");
  return data_->value;
}

void Module::collect(const std::string& prefix, std::vector<NamedParameter>& out) const {
  for (const Entry& e : entries_) {
    if (e.parameter)
      out.push_back({prefix, e.parameter});
    else
      e.module->collect(e.name.empty() ? prefix : prefix + e.name + ".", out);
  }
}

std::vector<NamedParameter> Module::parameters() const {
  std::vector<NamedParameter> out;
  collect("", out);
  std::unordered_set<const ParameterData*> known;
  std::erase_if(out, [&](const NamedParameter& p) { return !known.insert(p.data.get()).second; });
  return out;
}

void Module::set_training(bool on) {
  training_ = on;
  for (const Entry& e : entries_)
    if (e.module) e.module->set_training(on);
}

void Module::set_primary(bool on) {
  for (const NamedParameter& p : parameters())
    for (ParameterPart& part : p.data->parts)
      if (part.shard.ranges.empty()) part.shard.ranges = {{0, part.rows, on}};
}

Shape local_shape(const Shape& whole, const Shard& shard) {
  if (shard.ranges.empty() || whole.ndim() == 0) return whole;
  int64_t n = 0;
  for (const ShardRange& r : shard.ranges) n += r.end - r.begin;
  return whole.with(shard.dim, n);
}

Tensor local_values(const Tensor& whole, const Shard& shard) {
  if (shard.ranges.empty() || whole.ndim() == 0) return whole;
  const auto range = [&](const ShardRange& r) { return whole.slice(shard.dim, r.begin, r.end); };
  if (shard.ranges.size() == 1) return range(shard.ranges.front());
  Tensor local = empty(local_shape(whole.shape(), shard), whole.dtype(), whole.device());
  int64_t at = 0;
  for (const ShardRange& r : shard.ranges) {
    Tensor target = local.slice(shard.dim, at, at + r.end - r.begin);
    copy_(target, range(r));
    at += r.end - r.begin;
  }
  return local;
}

Parameter Module::parameter(std::string name, const Shape& shape, Initializer init, ParameterOptions options,
                            Shard shard) {
  const int64_t rows = shape.ndim() > 0 ? shape[0] : 1;
  auto data = std::make_shared<ParameterData>();
  data->parts.push_back({std::move(name), rows, std::move(init), std::move(shard)});
  data->shape = shape;
  data->options = options;
  entries_.push_back({"", data, nullptr});
  return Parameter(data);
}

Parameter Module::stacked_parameter(std::vector<ParameterPart> parts, const Shape& trailing,
                                    ParameterOptions options) {
  auto data = std::make_shared<ParameterData>();
  int64_t rows = 0;
  for (const ParameterPart& p : parts) rows += p.rows;
  data->shape = trailing.inserted(0, rows);
  data->parts = std::move(parts);
  data->options = options;
  entries_.push_back({"", data, nullptr});
  return Parameter(data);
}

void Module::add_child(std::string name, std::shared_ptr<Module> module) {
  entries_.push_back({std::move(name), nullptr, std::move(module)});
}

}  // namespace krait::layers
