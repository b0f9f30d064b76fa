#include "layers/hippo.h"
#include "tests/testing/golden.h"

using namespace krait;
using namespace krait::layers;

namespace {

// The word of the case's name after `prefix` and before "_N".
std::string kind_of(const GoldenCase& c, const std::string& prefix) {
  const size_t begin = prefix.size(), end = c.name().rfind("_N");
  return c.name().substr(begin, end - begin);
}

int64_t size_of_case(const GoldenCase& c) { return static_cast<int64_t>(c.number("N")); }

}  // namespace

TEST_CASE("HiPPO matrices meet the goldens") {
  for_each_golden("s4.h5", "hippo_", [](const GoldenCase& c) {
    const StateSpace s = hippo(kind_of(c, "hippo_"), size_of_case(c));
    c.check_within("out/A", s.A, 1e-15);
    c.check_within("out/B", s.B, 1e-15);
  });
}

TEST_CASE("the diagonal-plus-low-rank forms meet the goldens") {
  for_each_golden("s4.h5", "dplr_", [](const GoldenCase& c) {
    const std::string kind = kind_of(c, "dplr_");
    const Dplr d = hippo_dplr(kind, size_of_case(c));
    c.check("out/Lambda", d.Lambda);
    c.check("out/P", d.P.select(0, 0));
    c.check("out/B", d.B);
    c.check("out/V", d.V);
    c.check("out/P_dense", hippo_low_rank(kind, size_of_case(c)).select(0, 0));
  });
}

TEST_CASE("the rank-2 correction of legt meets the goldens") {
  for_each_golden("s4.h5", "nplr_", [](const GoldenCase& c) {
    const int64_t N = size_of_case(c);
    const Tensor P = hippo_low_rank("legt", N);
    c.check("out/P_dense", P);
    Tensor normal = hippo("legt", N).A.clone();
    for (int64_t k = 0; k < 2; ++k)
      for (int64_t i = 0; i < N * N; ++i)
        normal.data<double>()[i] += P.data<double>()[k * N + i / N] * P.data<double>()[k * N + i % N];
    c.check("out/normal", normal);
  });
}

TEST_CASE("S4D's diagonals meet the goldens") {
  for_each_golden("s4.h5", "s4d_init_", [](const GoldenCase& c) {
    c.check("out/A", s4d_diagonal(kind_of(c, "s4d_init_"), size_of_case(c)));
  });
}
