#include "data/split_plan.h"

#include <array>

#include "core/error.h"
#include "core/random.h"

namespace krait::data {

SplitPlan::SplitPlan(int64_t documents, double valid, double test, uint64_t seed)
    : valid_(valid), test_(test), key_(random_key(seed, "data.split")) {
  const std::array<bool, kSplits> wanted = {true, valid > 0, test > 0};
  const int64_t n_wanted = 1 + wanted[1] + wanted[2];
  KRAIT_CHECK(documents >= n_wanted, "{} documents cannot be shared over {} splits; give more, or --valid-file",
              documents, n_wanted);
  std::array<int64_t, kSplits> count{};
  for (int64_t i = 0; i < documents; ++i) ++count[static_cast<size_t>(hashed(i))];
  for (int s = 0; s < kSplits; ++s) {
    if (!wanted[static_cast<size_t>(s)] || count[static_cast<size_t>(s)] > 0) continue;
    // Taken from a split with more than one: the document with the lowest hash, for train the highest.
    int64_t best = -1;
    for (int64_t i = 0; i < documents; ++i) {
      if (count[static_cast<size_t>(of(i))] < 2) continue;
      if (best < 0 || (s == 0 ? hash(i) > hash(best) : hash(i) < hash(best))) best = i;
    }
    --count[static_cast<size_t>(of(best))];
    ++count[static_cast<size_t>(s)];
    moved_[s] = best;
  }
}

double SplitPlan::hash(int64_t document) const {
  const Philox r = philox(key_, static_cast<uint64_t>(document), 0);
  return static_cast<double>((uint64_t{r.word[0]} << 32 | r.word[1]) >> 11) * 0x1p-53;
}

Split SplitPlan::hashed(int64_t document) const {
  if (valid_ == 0 && test_ == 0) return Split::train;
  const double u = hash(document);
  return u < test_ ? Split::test : u < test_ + valid_ ? Split::valid : Split::train;
}

Split SplitPlan::of(int64_t document) const {
  for (int s = 0; s < kSplits; ++s)
    if (moved_[s] == document) return static_cast<Split>(s);
  return hashed(document);
}

SourcePlan::SourcePlan(Split whole, int64_t documents, int64_t length, double valid, double test, uint64_t seed)
    : whole_(whole), cuts_(whole == Split::train && documents == 1) {
  if (whole != Split::train) return;
  if (!cuts_) {
    plan_ = SplitPlan(documents, valid, test, seed);
    return;
  }
  const auto n = static_cast<double>(length);
  ends_[0] = static_cast<int64_t>(n * (1 - valid - test));
  ends_[1] = static_cast<int64_t>(n * (1 - test));
  ends_[2] = length;
}

Split SourcePlan::at(int64_t position) const {
  int s = 0;
  while (s + 1 < kSplits && position >= ends_[s]) ++s;
  return static_cast<Split>(s);
}

}  // namespace krait::data
