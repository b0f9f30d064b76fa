#pragma once
#include "layers/layer_context.h"
#include "layers/module.h"

namespace krait::layers {

/// What this process of a tensor group has of a number of equal things (heads, channels, hidden units).
struct Owned {
  int64_t begin = 0, end = 0;
  bool primary = true;  // false: a copy of what a member of lower rank has too
  int64_t count() const { return end - begin; }
  /// As a range of a dimension with `unit` entries for each, the first of which is at `offset`.
  ShardRange range(int64_t unit = 1, int64_t offset = 0) const { return {offset + begin * unit, offset + end * unit, primary}; }
  Shard rows(int64_t unit = 1) const { return {0, {range(unit)}}; }
  Shard columns(int64_t unit = 1) const { return {1, {range(unit)}}; }
};

/// An equal share of `count`. `key` names the option that decides the count ("attention.n_heads"), `things` what they
/// are: for the error when they do not divide.
Owned owned(const comm::GroupPtr& tensor, int64_t count, const std::string& key, const std::string& things);

/// An equal share where there are at least as many as members; else one, which several members then have.
Owned owned_or_copied(const comm::GroupPtr& tensor, int64_t count, const std::string& key, const std::string& things);

/// Shares that may differ by one.
Owned owned_uneven(const comm::GroupPtr& tensor, int64_t count);

}  // namespace krait::layers
