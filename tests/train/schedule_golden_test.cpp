#include "train/schedule.h"

#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::train;

TEST_CASE("learning-rate schedules meet the goldens") {
  for_each_golden("train.h5", "sched_", [](const GoldenCase& c) {
    ScheduleOptions o{.lr = c.number("base_lr"), .warmup_steps = static_cast<int64_t>(c.number("warmup")),
                      .total_steps = static_cast<int64_t>(c.number("total")), .min_lr_ratio = c.number("min_ratio"),
                      .decay_fraction = c.number("decay_frac")};
    const auto is = [&](const char* kind) { return c.name().find(std::string("sched_") + kind) == 0; };
    o.type = is("const")    ? ScheduleType::constant
             : is("cosine") ? ScheduleType::cosine
             : is("linear") ? ScheduleType::linear
                            : ScheduleType::wsd;
    if (is("wsd_linear")) o.decay_shape = DecayShape::linear;
    REQUIRE((o.type != ScheduleType::wsd || is("wsd_linear") || is("wsd_sqrt")));
    const std::vector<double> expected = c.tensor("out/lr").to_vector<double>();
    for (size_t s = 0; s < expected.size(); ++s) {
      INFO(c.name() << " step " << s);
      CHECK(learning_rate(o, static_cast<int64_t>(s)) == Approx(expected[s]).epsilon(1e-12).margin(1e-18));
    }
  });
}

TEST_CASE("schedule names are read back and unknown ones are listed") {
  for (const char* name : {"cosine", "linear", "constant", "wsd"}) CHECK(name_of(schedule_type_from_name(name)) == name);
  CHECK(contains(error_of([] { schedule_type_from_name("cosin"); }), "known: cosine, linear, constant, wsd"));
  CHECK(contains(error_of([] { decay_shape_from_name("cubic"); }), "known: sqrt, linear"));
}

TEST_CASE("a schedule with fewer steps than its warm-up stays finite") {
  for (const ScheduleType type : {ScheduleType::cosine, ScheduleType::linear, ScheduleType::wsd}) {
    const ScheduleOptions o{.type = type, .lr = 1, .warmup_steps = 10, .total_steps = 5};
    for (int64_t s = 0; s < 20; ++s) {
      CHECK(learning_rate(o, s) >= 0);
      CHECK(learning_rate(o, s) <= 1);
    }
  }
}
