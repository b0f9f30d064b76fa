#include "layers/parameter_store.h"

#include <set>

namespace krait::layers {

namespace {
Tensor entry_view(const Tensor& flat, const ParameterStore::Entry& e) {
  return flat.slice(0, e.offset, e.offset + e.length).view(e.shape);
}
// f(part, its rows of `whole`), in order.
template <class F>
void for_each_part(const NamedParameter& p, const Tensor& whole, F f) {
  int64_t row = 0;
  for (const ParameterPart& part : p.data->parts) {
    f(part, whole.ndim() == 0 ? whole : whole.slice(0, row, row + part.rows));
    row += part.rows;
  }
}
}  // namespace

ParameterStore::ParameterStore(Module& module, const StoreOptions& options)
    : options_(options), parameters_(module.parameters()) {
  std::set<std::string> names;
  for (const NamedParameter& p : parameters_) {
    for (const ParameterPart& part : p.data->parts)
      KRAIT_CHECK(names.insert(p.prefix + part.name).second, "two parameters are named {}", p.prefix + part.name);
    const int64_t length = p.data->shape.numel();
    entries_.push_back({p.prefix + p.data->parts.front().name, numel_, length, p.data->shape, p.data->options});
    parameter_count_ += length;
    numel_ += (length + kAlignment - 1) / kAlignment * kAlignment;
  }

  Tensor host = zeros({numel_}, options.master, kCpu);
  for (size_t i = 0; i < parameters_.size(); ++i)
    for_each_part(parameters_[i], entry_view(host, entries_[i]), [&](const ParameterPart& part, Tensor target) {
      Tensor value = empty(target.shape(), DType::f64, kCpu);
      part.init(value, random_key(options.seed, "init." + parameters_[i].prefix + part.name));
      copy_(target, value);
    });
  master_ = host.to(options.device);
  grad_ = zeros({numel_}, options.master, options.device);
  if (options.compute != options.master) {
    compute_ = empty({numel_}, options.compute, options.device);
    refresh_compute();
  }

  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Entry& e = entries_[i];
    const bool low = compute_.defined() && !e.options.keep_fp32;
    Variable& value = parameters_[i].data->value;
    value = Variable(entry_view(low ? compute_ : master_, e), e.options.trainable);
    if (e.options.trainable) value.set_grad(entry_view(grad_, e));
  }
}

void ParameterStore::refresh_compute() {
  if (compute_.defined()) copy_(compute_, master_);
}

std::vector<ParameterStore::NamedTensor> ParameterStore::named(const Tensor& flat) const {
  std::vector<NamedTensor> out;
  for (size_t i = 0; i < parameters_.size(); ++i)
    for_each_part(parameters_[i], entry_view(flat, entries_[i]), [&](const ParameterPart& part, const Tensor& rows) {
      out.push_back({parameters_[i].prefix + part.name, rows});
    });
  return out;
}

Tensor ParameterStore::named_master(const std::string& name) const {
  std::string known;
  for (const NamedTensor& t : named_masters()) {
    if (t.name == name) return t.value;
    known += " " + t.name;
  }
  throw_error(fmt::format("no parameter is named {}; the model has:{}", name, known));
}

}  // namespace krait::layers
