#include "layers/parameter_store.h"

#include <algorithm>
#include <set>

#include "layers/random_values.h"

namespace krait::layers {

namespace {
Tensor entry_view(const Tensor& flat, const ParameterStore::Entry& e) {
  return flat.slice(0, e.offset, e.offset + e.length).view(e.shape);
}
Shape whole_shape(const NamedParameter& p, const ParameterPart& part) {
  return p.data->shape.ndim() == 0 ? p.data->shape : p.data->shape.with(0, part.rows);
}
// f(part, its rows of `local`), in order.
template <class F>
void for_each_part(const NamedParameter& p, const Tensor& local, F f) {
  int64_t row = 0;
  for (const ParameterPart& part : p.data->parts) {
    const Shape shape = local_shape(whole_shape(p, part), part.shard);
    const int64_t rows = shape.ndim() == 0 ? 1 : shape[0];
    f(part, local.ndim() == 0 ? local : local.slice(0, row, row + rows));
    row += rows;
  }
}
// Of all parts, stacked.
Shape local_shape_of(const NamedParameter& p) {
  if (p.data->shape.ndim() == 0) return p.data->shape;
  int64_t rows = 0;
  Shape shape;
  for (const ParameterPart& part : p.data->parts) {
    shape = local_shape(whole_shape(p, part), part.shard);
    rows += shape[0];
  }
  return shape.with(0, rows);
}
}  // namespace

ParameterStore::ParameterStore(Module& module, const StoreOptions& options)
    : options_(options), parameters_(module.parameters()) {
  const bool copy = options.compute != options.master;
  const auto in_fp32 = [&](const NamedParameter& p) { return !copy || p.data->options.keep_fp32; };
  if (options.fp32_apart) std::stable_partition(parameters_.begin(), parameters_.end(), in_fp32);
  const auto end_bucket = [&] {
    if (buckets_.empty()) return;
    const int64_t granule = std::max(options.granule, kAlignment);
    numel_ = (numel_ + granule - 1) / granule * granule;
    buckets_.back().end = numel_;
  };
  std::set<std::string> names;
  for (const NamedParameter& p : parameters_) {
    const bool fp32 = in_fp32(p);
    if (buckets_.empty() || (options.bucket > 0 && numel_ - buckets_.back().begin >= options.bucket) ||
        (options.bucket > 0 && entries_.back().options.embedding && !p.data->options.embedding) ||
        (options.fp32_apart && fp32 != buckets_.back().fp32)) {
      end_bucket();
      buckets_.push_back({numel_, numel_, entries_.size(), 0, fp32});
    }
    ++buckets_.back().entries;
    for (const ParameterPart& part : p.data->parts)
      KRAIT_CHECK(names.insert(p.prefix + part.name).second, "two parameters are named {}", p.prefix + part.name);
    const Shape local = local_shape_of(p);
    const int64_t length = local.numel();
    entries_.push_back({p.prefix + p.data->parts.front().name, numel_, length, local, p.data->options});
    parameter_count_ += p.data->shape.numel();
    numel_ += (length + kAlignment - 1) / kAlignment * kAlignment;
  }
  end_bucket();

  Tensor host = zeros({numel_}, options.master, kCpu);
  for (size_t i = 0; i < parameters_.size(); ++i)
    for_each_part(parameters_[i], entry_view(host, entries_[i]), [&](const ParameterPart& part, Tensor target) {
      const uint64_t key = random_key(options.seed, "init." + parameters_[i].prefix + part.name);
      const bool any_dtype = part.init.target<RandomValues>() != nullptr;
      if (any_dtype && part.shard.ranges.empty()) return part.init(target, key);
      Tensor value = empty(whole_shape(parameters_[i], part), any_dtype ? options.master : DType::f64, kCpu);
      part.init(value, key);
      copy_(target, local_values(value, part.shard));
    });
  master_ = host.to(options.device);
  if (options.gradients) grad_ = zeros({numel_}, options.master, options.device);
  if (copy) {
    compute_ = empty({numel_}, options.compute, options.device);
    refresh_compute();
  }

  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Entry& e = entries_[i];
    const bool low = compute_.defined() && !e.options.keep_fp32;
    Variable& value = parameters_[i].data->value;
    value = Variable(entry_view(low ? compute_ : master_, e), e.options.trainable && options.gradients);
    if (value.requires_grad()) value.set_grad(entry_view(grad_, e));
  }
}

size_t ParameterStore::outer_buckets() const {
  for (size_t b = 0; b < buckets_.size(); ++b)
    for (size_t e = buckets_[b].first_entry; e < buckets_[b].first_entry + buckets_[b].entries; ++e)
      if (entries_[e].options.embedding) return b + 1;
  return 1;
}

void ParameterStore::release_masters() {
  KRAIT_ASSERT(options_.fp32_apart && compute_.defined(), "every master weight is in use.");
  int64_t kept = 0;
  for (const Bucket& b : buckets_)
    if (b.fp32) kept = b.end;
  master_ = master_.slice(0, 0, kept).clone();
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].options.keep_fp32) parameters_[i].data->value.set_data(entry_view(master_, entries_[i]));
}

void ParameterStore::move_grads(Tensor to) {
  KRAIT_ASSERT(to.shape() == grad_.shape() && to.dtype() == grad_.dtype(), "{} for gradients of {}", describe(to), describe(grad_));
  copy_(to, grad_);
  grad_ = std::move(to);
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].options.trainable) parameters_[i].data->value.set_grad(entry_view(grad_, entries_[i]));
}

void ParameterStore::move_compute(Tensor to) {
  KRAIT_ASSERT(compute_.defined() && to.shape() == compute_.shape() && to.dtype() == compute_.dtype(), "{} for compute copies", describe(to));
  copy_(to, compute_);
  compute_ = std::move(to);
  for (size_t i = 0; i < entries_.size(); ++i)
    if (!entries_[i].options.keep_fp32) parameters_[i].data->value.set_data(entry_view(compute_, entries_[i]));
}

void ParameterStore::release_grads(const std::function<Tensor(size_t)>& make) {
  grad_ = {};
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].options.trainable) parameters_[i].data->value.set_grad_source([make, i] { return make(i); });
}

void ParameterStore::release_values() {
  master_ = compute_ = {};
  for (const NamedParameter& p : parameters_) p.data->value.set_data({});
}

Tensor ParameterStore::view(const Tensor& buffer, size_t entry, int64_t begin) const {
  const Entry& e = entries_[entry];
  return buffer.slice(0, e.offset - begin, e.offset - begin + e.length).view(e.shape);
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

std::vector<ParameterStore::NamedPart> ParameterStore::parts(const Tensor& flat) const {
  std::vector<NamedPart> out;
  for (size_t i = 0; i < parameters_.size(); ++i)
    for_each_part(parameters_[i], entry_view(flat, entries_[i]), [&](const ParameterPart& part, const Tensor& rows) {
      NamedPart named{parameters_[i].prefix + part.name, rows, whole_shape(parameters_[i], part), part.shard};
      if (named.shard.ranges.empty()) named.shard.ranges = {{0, part.rows}};
      out.push_back(std::move(named));
    });
  return out;
}

std::vector<std::pair<int64_t, int64_t>> ParameterStore::primary_ranges() const {
  std::vector<std::pair<int64_t, int64_t>> out;
  bool joins = false;  // the element before belongs to the last range
  for (const NamedPart& part : parts(master_)) {
    const auto& ranges = part.shard.ranges;
    const bool together = part.shard.dim != 0 || part.whole.ndim() == 0;  // what is cut elsewhere is not flat
    int64_t at = part.value.offset() - master_.offset();
    const int64_t row = part.value.ndim() == 0 || part.value.size(0) == 0 ? 1 : part.value.numel() / part.value.size(0);
    for (const ShardRange& r : ranges) {
      KRAIT_ASSERT(!together || r.primary == ranges.front().primary, "{}: copies are mixed inside a row", part.name);
      const int64_t length = together ? part.value.numel() : (r.end - r.begin) * row;
      if (r.primary) {
        if (joins) out.back().second = at + length;
        else out.push_back({at, at + length});
      }
      joins = r.primary;
      at += length;
      if (together) break;
    }
  }
  if (joins) out.back().second = numel_;
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
