#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace krait::data {

enum class Split : uint8_t { train, valid, test };
inline constexpr int kSplits = 3;
inline const char* name_of(Split split) {
  static constexpr const char* kNames[] = {"train", "valid", "test"};
  return kNames[static_cast<int>(split)];
}

/// Which split each of `documents` documents belongs to: by a hash of index and seed, so that a document keeps its
/// split when others are added behind it. A share above zero gets at least one document, as does train.
/// Needs constant memory.
class SplitPlan {
 public:
  SplitPlan() = default;  // everything to train
  SplitPlan(int64_t documents, double valid, double test, uint64_t seed);
  Split of(int64_t document) const;

 private:
  Split hashed(int64_t document) const;
  double hash(int64_t document) const;
  double valid_ = 0, test_ = 0;
  uint64_t key_ = 0;
  int64_t moved_[kSplits] = {-1, -1, -1};  // the document given to a split that the hash left empty
};

}  // namespace krait::data
