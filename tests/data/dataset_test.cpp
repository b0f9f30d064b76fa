#include "data/dataset.h"

#include <numeric>
#include <set>

#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;

namespace {

// Token i is i: what a batch shows tells where it came from.
TokensPtr counting(int64_t n, std::vector<int64_t> documents = {}) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  std::iota(ids.begin(), ids.end(), 0);
  return tokens_in_memory(std::move(ids), std::move(documents), {}, "a.h5: split train");
}

bool same(const Tensor& a, const Tensor& b) {
  if (a.defined() != b.defined()) return false;
  return !a.defined() || (a.shape() == b.shape() && a.to_vector<int64_t>() == b.to_vector<int64_t>());
}

bool same(const Batch& a, const Batch& b) {
  return a.step == b.step && a.n_targets == b.n_targets && same(a.tokens, b.tokens) && same(a.targets, b.targets) &&
         same(a.segments, b.segments) && same(a.positions, b.positions) && same(a.resets, b.resets);
}

// How often each position of the split is a target; every counted target must be the token behind the one shown.
std::vector<int> target_counts(const Dataset& set, int64_t n) {
  std::vector<int> counts(static_cast<size_t>(n), 0);
  for (int64_t step = 0; step < set.steps(); ++step) {
    const Batch batch = set.get(step);
    const auto shown = batch.tokens.to_vector<int64_t>(), targets = batch.targets.to_vector<int64_t>();
    int64_t counted = 0;
    for (size_t i = 0; i < targets.size(); ++i) {
      if (targets[i] == kIgnore) continue;
      if (targets[i] != shown[i] + 1) return {};
      ++counts[static_cast<size_t>(targets[i])];
      ++counted;
    }
    if (counted != batch.n_targets) return {};
  }
  return counts;
}

std::vector<int> once_each(int64_t n, const std::vector<int64_t>& except) {
  std::vector<int> out(static_cast<size_t>(n), 1);
  for (const int64_t i : except) out[static_cast<size_t>(i)] = 0;
  return out;
}

template <class Make>
void check_ranks(Make&& make) {
  const DatasetPtr set = make();
  for (const int64_t step : {0, 1}) {
    const Batch whole = set->get(step);
    for (const int64_t world : {2, 3, 6}) {
      int64_t targets = 0;
      for (int64_t rank = 0; rank < world; ++rank) {
        const Batch part = set->get(step, rank, world);
        const int64_t b = 6 / world;
        CHECK(same(part.tokens, whole.tokens.slice(0, rank * b, rank * b + b)));
        CHECK(same(part.targets, whole.targets.slice(0, rank * b, rank * b + b)));
        CHECK(same(part.resets, whole.resets.slice(0, rank * b, rank * b + b)));
        if (whole.segments.defined()) CHECK(same(part.segments, whole.segments.slice(0, rank * b, rank * b + b)));
        targets += part.n_targets;
      }
      CHECK(targets == whole.n_targets);
    }
    CHECK(same(make()->get(step), whole));
  }
}

}  // namespace

TEST_CASE("every target is counted once by sliding windows of any stride") {
  for (const int64_t n : {9, 33, 64, 65, 100})
    for (const int64_t stride : {0, 1, 3, 5, 8})
      for (const int64_t batch : {1, 4}) {
        CAPTURE(n, stride, batch);
        const auto windows = sliding_windows(counting(n), {.context = 8, .batch_size = batch, .stride = stride});
        CHECK(target_counts(*windows, n) == once_each(n, {0}));
        CHECK(windows->total_targets() == n - 1);
        const std::vector<int64_t> starts = {0, 3, 4, n - 1};
        const auto packed = sliding_windows(
            counting(n, starts), {.context = 8, .batch_size = batch, .stride = stride, .documents = Documents::pack});
        CHECK(target_counts(*packed, n) == once_each(n, starts));
        CHECK(packed->total_targets() == n - 4);
      }
}

TEST_CASE("a batch has no more rows than a split has windows") {
  const auto windows = sliding_windows(counting(40), {.context = 8, .batch_size = 1000});
  CHECK(windows->batch_size() == 5);
  CHECK(windows->steps() == 1);
  CHECK(windows->get(0).tokens.shape() == Shape{5, 8});
  CHECK(target_counts(*windows, 40) == once_each(40, {0}));
}

TEST_CASE("a sliding window counts a target with at least context - stride tokens before it") {
  const auto windows = sliding_windows(counting(40), {.context = 8, .batch_size = 1, .stride = 3});
  const Batch second = windows->get(1);
  CHECK(second.tokens.to_vector<int64_t>() == std::vector<int64_t>{3, 4, 5, 6, 7, 8, 9, 10});
  CHECK(second.targets.to_vector<int64_t>() == std::vector<int64_t>{-100, -100, -100, -100, -100, 9, 10, 11});
}

TEST_CASE("every target is counted once by streams, which carry on where they stopped") {
  for (const int64_t n : {33, 64, 65, 101})
    for (const int64_t batch : {1, 3, 4}) {
      CAPTURE(n, batch);
      const auto set = streams(counting(n), {.context = 8, .batch_size = batch});
      CHECK(target_counts(*set, n) == once_each(n, {0}));
      const auto packed =
          streams(counting(n, {0, 8, 20}), {.context = 8, .batch_size = batch, .documents = Documents::pack});
      CHECK(target_counts(*packed, n) == once_each(n, {0, 8, 20}));
    }
  const auto set = streams(counting(97, {0, 8, 20}), {.context = 8, .batch_size = 2, .documents = Documents::pack});
  std::vector<int64_t> first_row;
  for (int64_t step = 0; step < set->steps(); ++step) {
    const auto row = set->get(step).tokens.slice(0, 0, 1).to_vector<int64_t>();
    first_row.insert(first_row.end(), row.begin(), row.end());
  }
  for (size_t i = 0; i < first_row.size(); ++i) CHECK(first_row[i] == static_cast<int64_t>(i));
  CHECK(set->get(0).resets.to_vector<int64_t>() == std::vector<int64_t>{1, 1});
  CHECK(set->get(1).resets.to_vector<int64_t>() == std::vector<int64_t>{1, 0});  // a document begins at token 8
  CHECK(set->get(2).resets.to_vector<int64_t>() == std::vector<int64_t>{0, 0});
}

TEST_CASE("repeated streams are full windows, cut elsewhere in each pass") {
  const auto set = streams(counting(1000), {.context = 8, .batch_size = 3, .repeat = true});
  CHECK(set->steps() == -1);
  const int64_t pass = 999 / 24;
  std::set<int64_t> starts;
  for (int64_t step = 0; step < 5 * pass; ++step) {
    const Batch batch = set->get(step);
    CHECK(batch.n_targets == 24);
    CHECK(batch.resets.to_vector<int64_t>() == std::vector<int64_t>(3, step % pass == 0));
    const auto shown = batch.tokens.to_vector<int64_t>();
    if (step % pass == 0)
      starts.insert(shown[0]);
    else
      CHECK(shown[0] == set->get(step - 1).targets.to_vector<int64_t>()[7]);
  }
  CHECK(starts.size() > 1);
}

TEST_CASE("crops are spread over the whole split and differ by seed and step") {
  const auto set = random_crops(counting(100), {.context = 9, .batch_size = 50, .seed = 1});
  std::vector<int> seen(100, 0);
  for (int64_t step = 0; step < 40; ++step) {
    const Batch batch = set->get(step);
    CHECK(batch.n_targets == 450);
    CHECK_FALSE(batch.segments.defined());
    const auto shown = batch.tokens.to_vector<int64_t>(), targets = batch.targets.to_vector<int64_t>();
    for (size_t i = 0; i < shown.size(); ++i)
      if (targets[i] != shown[i] + 1) FAIL("target " << targets[i] << " behind " << shown[i]);
    for (size_t row = 0; row < 50; ++row) ++seen[static_cast<size_t>(shown[row * 9])];
  }
  for (size_t start = 0; start < 100; ++start) CHECK((seen[start] > 0) == (start <= 90));
  CHECK_FALSE(same(set->get(0).tokens, set->get(1).tokens));
  CHECK_FALSE(same(set->get(0).tokens,
                   random_crops(counting(100), {.context = 9, .batch_size = 50, .seed = 2})->get(0).tokens));
}

TEST_CASE("a step split otherwise into batches shows the same rows") {
  const auto whole = random_crops(counting(500), {.context = 5, .batch_size = 12, .seed = 3});
  const auto parts = random_crops(counting(500), {.context = 5, .batch_size = 4, .seed = 3});
  for (int64_t i = 0; i < 3; ++i)
    CHECK(same(parts->get(3 * 7 + i).tokens, whole->get(7).tokens.slice(0, 4 * i, 4 * i + 4)));
}

TEST_CASE("packed rows reset segments and positions where documents begin") {
  const auto set =
      sliding_windows(counting(20, {0, 3, 4, 10, 16}), {.context = 8, .batch_size = 2, .documents = Documents::pack});
  const Batch batch = set->get(0);
  CHECK(batch.segments.to_vector<int64_t>() == std::vector<int64_t>{0, 0, 0, 1, 2, 2, 2, 2, 0, 0, 1, 1, 1, 1, 1, 1});
  CHECK(batch.positions.to_vector<int64_t>() == std::vector<int64_t>{0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5});
  CHECK(batch.targets.to_vector<int64_t>() ==
        std::vector<int64_t>{1, 2, -100, -100, 5, 6, 7, 8, 9, -100, 11, 12, 13, 14, 15, -100});
  CHECK(batch.n_targets == 12);
}

TEST_CASE("the batches of all ranks together are the batch of one rank") {
  const std::vector<int64_t> documents = {0, 7, 50, 51, 180};
  check_ranks([&] {
    return random_crops(counting(200, documents), {.context = 8, .batch_size = 6, .documents = Documents::pack});
  });
  check_ranks([&] { return sliding_windows(counting(90, {0, 7, 50}), {.context = 8, .batch_size = 6, .stride = 8}); });
  check_ranks(
      [&] { return streams(counting(200, documents), {.context = 8, .batch_size = 6, .documents = Documents::pack}); });
}

TEST_CASE("prefetched batches are those of get, from any step, to the end") {
  for (const int64_t depth : {1, 3}) {
    const auto crops = random_crops(counting(100), {.context = 9, .batch_size = 4, .seed = 1});
    Prefetcher prefetcher(crops, 5, 1, 2, depth);
    for (int64_t step = 5; step < 30; ++step) CHECK(same(*prefetcher.next(), crops->get(step, 1, 2)));
    const auto windows = sliding_windows(counting(100), {.context = 9, .batch_size = 4});
    Prefetcher finite(windows, 0, 0, 1, depth);
    for (int64_t step = 0; step < windows->steps(); ++step) CHECK(same(*finite.next(), windows->get(step)));
    CHECK_FALSE(finite.next());
    CHECK_FALSE(finite.next());
  }
}

TEST_CASE("an error of the data set reaches the caller of next, after the good batches") {
  class Failing final : public Dataset {
   public:
    Batch get(int64_t step, int64_t, int64_t) const override {
      if (step == 2) throw Error("unreadable chunk");
      Batch batch;
      batch.step = step;
      return batch;
    }
    int64_t steps() const override { return -1; }
    int64_t batch_size() const override { return 1; }
    int64_t context() const override { return 1; }
    int64_t total_targets() const override { return -1; }
  };
  Prefetcher prefetcher(std::make_shared<Failing>(), 0);
  CHECK(prefetcher.next()->step == 0);
  CHECK(prefetcher.next()->step == 1);
  CHECK(error_of([&] { (void)prefetcher.next(); }) == "unreadable chunk");
  CHECK(error_of([&] { (void)prefetcher.next(); }) == "unreadable chunk");
}

TEST_CASE("windows that cannot be are refused") {
  const std::string message = error_of([] { (void)random_crops(counting(64), {.context = 64, .batch_size = 1}); });
  CHECK(contains(message, "a.h5: split train has 64 tokens, too few for a context of 64"));
  CHECK(contains(message, "at most 63"));
  CHECK_NOTHROW(random_crops(counting(65), {.context = 64, .batch_size = 1})->get(0));
  CHECK(
      contains(error_of([] { (void)sliding_windows(counting(64), {.context = 100, .batch_size = 1}); }), "at most 63"));
  CHECK(contains(error_of([] { (void)sliding_windows(counting(64), {.context = 8, .batch_size = 1, .stride = 9}); }),
                 "the stride 9 is not between 1 and the context 8"));
  CHECK(contains(error_of([] { (void)streams(counting(64), {.context = 8, .batch_size = 8, .repeat = true}); }),
                 "too few for 8 rows of 8"));
  CHECK(contains(error_of([] { (void)random_crops(counting(64), {.context = 8, .batch_size = 0}); }), "batch size"));
  const auto set = random_crops(counting(64), {.context = 8, .batch_size = 4});
  CHECK(contains(error_of([&] { (void)set->get(0, 0, 3); }), "a batch of 4 rows cannot be shared evenly by 3 ranks"));
  CHECK(contains(error_of([&] { (void)set->get(0, 2, 2); }), "rank 2 of 2"));
}
