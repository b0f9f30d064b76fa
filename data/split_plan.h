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

/// How the documents of one source are dealt out: all to `whole` unless that is train, else by a SplitPlan. A single one of
/// them is cut where the shares end, by its position of `length`.
class SourcePlan {
 public:
  SourcePlan() = default;  // everything to train
  SourcePlan(Split whole, int64_t documents, int64_t length, double valid, double test, uint64_t seed);
  bool cuts() const { return cuts_; }
  /// Of a source that is not cut.
  Split of(int64_t document) const { return whole_ != Split::train ? whole_ : plan_.of(document); }
  /// Of one that is.
  Split at(int64_t position) const;
  int64_t end(Split split) const { return ends_[static_cast<int>(split)]; }

 private:
  Split whole_ = Split::train;
  bool cuts_ = false;
  SplitPlan plan_;
  int64_t ends_[kSplits] = {};
};

}  // namespace krait::data
