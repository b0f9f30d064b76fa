#include <map>

#include "autograd/shape.h"
#include "autograd/slstm.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16};

struct Leaves {
  const GoldenCase& golden;
  DType dtype;
  std::map<std::string, Variable> all;
  // A data set of "in/" or "param/" as a leaf; undefined when the case lacks it.
  Variable operator()(const std::string& path, bool wide = false) {
    if (!golden.has(path)) return {};
    return all[path] = Variable(golden.tensor(path).to(wide ? accum_dtype(dtype) : dtype), true);
  }
  void check_grads() const {
    for (const auto& [path, v] : all)
      if (golden.has("grad/" + path))
        golden.check_within("grad/" + path, v.grad(), golden.tolerance("grad/" + path, dtype));
  }
};

// Outputs, final states and every gradient; states by name, in the order of the state tensor.
void check(const GoldenCase& golden, Leaves& leaves, const RecurrentOut& out, const std::vector<std::string>& names) {
  const DType dtype = leaves.dtype;
  golden.check_within("out/y", out.y.data(), golden.tolerance("out/y", dtype));
  Vars outputs{out.y};
  std::vector<Tensor> seeds{golden.tensor("upstream/y").to(dtype)};
  for (size_t k = 0; k < names.size(); ++k) {
    const std::string name = names[k] + "_last";
    const Variable last = reshape(select(out.state, 0, static_cast<int64_t>(k)), golden.tensor("state/" + name).shape());
    golden.check_within("state/" + name, last.data(), golden.tolerance("state/" + name, dtype));
    if (!golden.has("upstream/" + name)) continue;
    outputs.push_back(last);
    seeds.push_back(golden.tensor("upstream/" + name).to(last.dtype()));
  }
  backward(outputs, seeds);
  leaves.check_grads();
}

}  // namespace

TEST_CASE("the sLSTM cell meets its goldens: outputs, states, every gradient") {
  for_each_golden("xlstm.h5", "slstm_cell_", [](const GoldenCase& golden) {
    for (const DType dtype : kTypes) {
      INFO(golden.name() << " " << name_of(dtype));
      Leaves leaf{golden, dtype, {}};
      Variable state;
      if (golden.has("in/y0")) {
        state = stack({leaf("in/y0", true), leaf("in/c0", true), leaf("in/n0", true), leaf("in/m0", true)}, 0);
      }
      const auto out = slstm(leaf("in/wx"), leaf("param/R"), leaf("param/b", true), state, {});
      check(golden, leaf, out, {"y", "c", "n", "m"});
    }
  });
}

TEST_CASE("rnn, lstm and gru meet their goldens: outputs, states, every gradient") {
  for (const auto cell : {kernels::RecurrentCell::rnn, kernels::RecurrentCell::lstm, kernels::RecurrentCell::gru})
    for_each_golden("baselines.h5", std::string(kernels::name_of(cell)) + "_", [&](const GoldenCase& golden) {
      for (const DType dtype : kTypes) {
        INFO(golden.name() << " " << name_of(dtype));
        Leaves leaf{golden, dtype, {}};
        const bool two = golden.has("in/c0");
        Vars states{leaf("in/h0", true)};
        if (two) states.push_back(leaf("in/c0", true));
        const auto out = recurrent(cell, leaf("in/x"), leaf("param/w_ih"), leaf("param/w_hh"), leaf("param/b_ih"),
                                   leaf("param/b_hh"), unsqueeze(stack(states, 0), 2), {});
        check(golden, leaf, out, two ? std::vector<std::string>{"h", "c"} : std::vector<std::string>{"h"});
      }
    });
}
