#include "layers/inverse_softplus.h"

#include "tests/testing/golden.h"

using namespace krait;
using namespace krait::testing;

TEST_CASE("the inverse of softplus meets the golden, down to the smallest time step") {
  for_each_golden("train.h5", "inv_softplus", [](const GoldenCase& c) {
    std::vector<double> x;
    for (const double dt : c.tensor("out/dt").to_vector<double>()) x.push_back(layers::inverse_softplus(dt));
    c.check_within("out/x", from_vector(x), 1e-12);
  });
}
