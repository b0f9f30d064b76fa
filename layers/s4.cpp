#include "layers/s4.h"

#include <cmath>

#include "autograd/activation.h"
#include "autograd/collective.h"
#include "autograd/dropout.h"
#include "autograd/elementwise.h"
#include "autograd/fft_conv.h"
#include "autograd/linear.h"
#include "autograd/s4_kernel.h"
#include "autograd/s4_scan.h"
#include "autograd/shape.h"
#include "autograd/shared_rows.h"
#include "core/comm/collectives.h"
#include "kernels/elementwise.h"
#include "kernels/fft_conv.h"
#include "kernels/glu_linear.h"
#include "kernels/s4_kernel.h"
#include "kernels/s4_step.h"
#include "layers/hippo.h"
#include "layers/linear.h"
#include "layers/whole_sequences.h"

namespace krait::layers {

namespace {

Discretization discretization_of(const S4Config& c) {
  return c.discretization == "zoh" ? Discretization::zoh : Discretization::bilinear;
}

/// The name of the init in layers/hippo.h.
std::string library_name(const S4Config& c) {
  if (c.form == "dense") return "gaussian";
  if (c.real) return "diag_gaussian";
  if (c.init == "dplr_random") return "random";
  if (c.init == "random" || c.init == "diag_random") return "random_diagonal";
  return c.init;
}

/// One set's initial values of a diagonal or DPLR system.
S4Init one_set(const S4Config& c, int64_t n, uint64_t key) {
  return c.form == "dplr" ? s4_init(library_name(c), 2 * n, key, c.b_clip)
                          : s4d_init(library_name(c), 2 * n, key, c.b_clip);
}

/// An initializer that asks for each set's values, with a key of its own, and copies one of them.
template <class F>
Initializer each_set(F values_of_set) {
  return [=](Tensor& value, uint64_t key) {
    for (int64_t i = 0; i < value.size(0); ++i) {
      Tensor set = value.select(0, i);
      copy_(set, values_of_set(random_key(key, fmt::format("set.{}", i))));
    }
  };
}

}  // namespace

S4::S4(const S4Config& config, const LayerContext& context)
    : config_(config),
      sequence_(context.parallel.sequence),
      tensor_(context.parallel.tensor),
      own_(owned(tensor_, context.d_model, "model.d_model", "channels")),
      sets_(owned_or_copied(tensor_, config.n_ssm, "n_ssm", "sets of states")),
      h_(own_.count()),
      n_(config.real || config.form == "dense" ? config.d_state : config.d_state / 2),
      l_max_(context.context),
      stream_(context.stream("s4.dropout")) {
  KRAIT_CHECK(l_max_ > 0, "s4: the model's context is {}; its kernels need a length", l_max_);
  forward_ = make_system("kernel.", nullptr);
  if (config_.bidirectional) reverse_ = make_system("kernel_rev.", config_.tie_reverse ? &forward_ : nullptr);
  const int64_t h = channels(), width = config_.copies * h, rows = config_.final_act == "glu" ? 2 * h : h;
  const double bound = 1.0 / std::sqrt(static_cast<double>(width));
  D_ = parameter("D", {width}, normal(1.0), {.decay = false, .keep_fp32 = true, .trainable = !config_.frozen("D")},
                 of_copies(0));
  out_weight_ = parameter("out.weight", {rows, width}, uniform(-bound, bound), {}, of_copies(1));
  out_bias_ = parameter("out.bias", {rows}, uniform(-bound, bound), {.decay = false});
}

namespace {

// C_tilde = C (I - A_bar^L), C complex normal with E|C|^2 = 1, for each copy's rows.
Initializer c_tilde_init(const std::shared_ptr<std::map<std::string, Tensor>>& first_values, int64_t h, int64_t l_max) {
  return [=](Tensor& value, uint64_t key) {
    fill_normal_(value, 0.0, std::sqrt(0.5), key);
    const auto& v = *first_values;
    for (int64_t row = 0; row < value.size(0); row += h) {
      Tensor rows = value.slice(0, row, row + h);
      copy_(rows, kernels::s4_c_to_tilde({v.at("log_dt"), v.at("log_A_re"), v.at("A_im"), v.at("P"), v.at("B"), rows}, l_max));
    }
  };
}

}  // namespace

// Of a dimension that has the channels of each copy, one copy after the other.
Shard S4::of_copies(int64_t dim) const {
  Shard shard{dim, {}};
  for (int64_t copy = 0; copy < config_.copies; ++copy) shard.ranges.push_back(own_.range(1, copy * channels()));
  return shard;
}

// A set that other members have a copy of gets the sum of their gradients.
Variable S4::shared(const Parameter& set) const {
  if (!set.defined()) return {};
  if (tensor_->size() <= config_.n_ssm) return set.variable();
  Variable own = set;
  share_rows({{own, {{0, sets_.count(), sets_.begin}}}}, config_.n_ssm, tensor_);
  return own;
}

S4::System S4::make_system(const std::string& name, const System* shared) {
  const S4Config& c = config_;
  const int64_t s = c.n_ssm, h = channels(), rows = c.copies * h;
  System p = shared ? *shared : System{};
  if (!shared) p.first_values = std::make_shared<std::map<std::string, Tensor>>();
  const auto add = [&](const std::string& own, const Shape& shape, const Initializer& init, const char* group) {
    const Initializer remembering = [init, own, seen = p.first_values](Tensor& value, uint64_t key) {
      init(value, key);
      (*seen)[own] = value.clone();
    };
    const bool trainable = !c.frozen(group) && !(c.real && own == "A_im");
    return parameter(name + own, shape, remembering,
                     {.decay = false, .lr_scale = c.ssm_lr_scale, .keep_fp32 = true, .trainable = trainable},
                     own == "log_dt" ? own_.rows() : sets_.rows());
  };
  // C is trained like any matrix, but never rounded.
  const ParameterOptions c_options{.keep_fp32 = true, .trainable = !c.frozen("C")};
  if (!shared) p.log_dt = add("log_dt", {h}, uniform(std::log(c.dt_min), std::log(c.dt_max)), "dt");
  if (c.form == "dense") {
    const auto set = [c](uint64_t key) { return dense_init("gaussian", c.d_state, key, c.init_gain); };
    if (!shared) {
      p.A = add("A", {s, n_, n_}, each_set([set](uint64_t key) { return set(key).A; }), "A");
      p.B = add("B", {s, n_}, each_set([set](uint64_t key) { return set(key).B; }), "B");
    }
    p.C = parameter(name + "C", {rows, n_}, normal(1.0), c_options, of_copies(0));
    return p;
  }
  const auto set = [c, n = n_](uint64_t key) { return one_set(c, n, key); };
  if (!shared) {
    p.log_A_re = add("log_A_re", {s, n_}, each_set([set](uint64_t key) { return set(key).log_A_re; }), "A");
    p.A_im = add("A_im", {s, n_}, each_set([set](uint64_t key) { return set(key).A_im; }), "A");
    if (c.form == "dplr")
      p.P = add("P", set(0).P.shape().inserted(0, s), each_set([set](uint64_t key) { return set(key).P; }), "A");
    p.B = add("B", {s, n_, 2}, each_set([set](uint64_t key) { return set(key).B; }), "B");
  }
  const Shape shape{rows, n_, 2};
  if (c.form == "dplr") {
    p.C = parameter(name + "C_tilde", shape, c_tilde_init(p.first_values, h, l_max_), c_options, of_copies(0));
  } else if (c.real) {
    // 2 Re C x = C' x with C' ~ N(0, 1), as in the dense control
    p.C = parameter(name + "C", shape, [](Tensor& value, uint64_t key) {
      fill_normal_(value, 0.0, 0.5, key);
      Tensor imaginary = value.select(2, 1);
      fill_(imaginary, 0.0);
    }, c_options, of_copies(0));
  } else {
    p.C = parameter(name + "C", shape, normal(std::sqrt(0.5)), c_options, of_copies(0));
  }
  return p;
}

// The parameters of channels [first, end) of each copy. A channel's set may be shared with others.
S4::Values S4::values(const System& p, int64_t first, int64_t end) const {
  Values all{p.log_dt, shared(p.log_A_re), shared(p.A_im), shared(p.P), shared(p.A), shared(p.B), {}};
  const int64_t h = all.log_dt.size(0), rows = p.C.variable().size(0);
  const auto channels = [&](const Variable& v, int64_t row) { return slice(v, 0, row + first, row + end); };
  for (int64_t row = 0; row < rows; row += h) all.C.push_back(first == 0 && end == h && rows == h ? p.C.variable() : channels(p.C, row));
  if (first == 0 && end == h) return all;
  const int64_t per_set = h / all.B.size(0), set = first / per_set, last = (end - 1) / per_set;
  all.log_dt = channels(all.log_dt, 0);
  for (Variable* v : {&all.log_A_re, &all.A_im, &all.P, &all.A, &all.B}) {
    if (!v->defined()) continue;
    if (set == last || (first % per_set == 0 && end % per_set == 0)) {
      *v = slice(*v, 0, set, last + 1);
      continue;
    }
    Vars own;  // sets that other channels share too: one for each channel
    for (int64_t channel = first; channel < end; ++channel)
      own.push_back(slice(*v, 0, channel / per_set, channel / per_set + 1));
    *v = concat(own, 0);
  }
  return all;
}

Variable S4::kernel_of_copy(const Values& p, const Variable& C, int64_t length) const {
  const auto discretization = discretization_of(config_);
  if (config_.form == "dense") return dense_ssm_kernel(p.log_dt, p.A, p.B, C, length, discretization);
  if (config_.form == "diagonal") return s4d_kernel(p.log_dt, p.log_A_re, p.A_im, p.B, C, length, discretization);
  if (length <= l_max_) return s4_kernel(p.log_dt, p.log_A_re, p.A_im, p.P, p.B, C, l_max_);
  KRAIT_CHECK(!recording() || !C.requires_grad(),
              "s4: {} positions in training, but the kernel was made for {} (the model's context); raise data.context",
              length, l_max_);
  kernels::S4Parameters longer{p.log_dt.data(), p.log_A_re.data(), p.A_im.data(), p.P.data(), p.B.data(), C.data()};
  int64_t made_for = l_max_;
  for (; made_for < length; made_for *= 2) longer.C_tilde = kernels::s4_double_length(longer, made_for);
  return Variable(kernels::s4_kernel_forward(longer, made_for));
}

// K (copies (end - first), length or more).
Variable S4::kernel(const System& p, int64_t length, int64_t first, int64_t end) const {
  const Values v = values(p, first, end);
  Vars all;
  for (const Variable& C : v.C) all.push_back(kernel_of_copy(v, C, length));
  return all.size() == 1 ? all[0] : concat(all, 0);
}

// Tied: a channel is kept or dropped at all positions.
Variable S4::dropped(const Variable& y) const {
  const bool tied = config_.tie_dropout;
  const Variable on = tied ? Variable(ones({y.size(0), 1, y.size(2)}, y.dtype(), y.device())) : y;
  DropoutPart part = tied ? DropoutPart{} : DropoutPart::of(y, *sequence_);
  if (tensor_->size() == 1) {
    const Variable kept = dropout(on, config_.dropout, stream_, part);
    return tied ? y * kept : kept;
  }
  part.channels = config_.copies * channels();
  Vars copies;
  for (int64_t copy = 0; copy < config_.copies; ++copy) {
    part.channel = copy * channels() + own_.begin;
    copies.push_back(dropout(slice(on, 2, copy * h_, (copy + 1) * h_), config_.dropout, stream_, part));
  }
  const Variable kept = copies.size() == 1 ? copies[0] : concat(copies, 2);
  return tied ? y * kept : kept;
}

Variable S4::output(const Variable& y_in) const {
  const bool drops = training() && config_.dropout > 0;
  Variable y;
  if (config_.activation == "gelu" && drops && !config_.tie_dropout && tensor_->size() == 1) {
    y = gelu_dropout(y_in, GeluForm::erf, config_.dropout, stream_, DropoutPart::of(y_in, *sequence_));
  } else {
    y = config_.activation == "gelu" ? gelu(y_in, GeluForm::erf) : config_.activation == "silu" ? silu(y_in) : y_in;
    if (drops) y = dropped(y);
  }
  return mixed(y);
}

Variable S4::mixed(const Variable& y) const {
  const Variable z = linear_sum(y, out_weight_, out_bias_, tensor_);
  return config_.final_act == "id" ? z : glu(z);
}

// y = K * u + D u (+ K1 * u from the right) of channels [first, end) of x, for each copy: (b, l, copies (end - first)).
Variable S4::convolution(const Variable& x, int64_t first, int64_t end, const Tensor& segments) const {
  const Variable u = repeated(x);
  const int64_t l = std::max<int64_t>(1, x.size(1)), h = forward_.log_dt.variable().size(0);
  Variable D = D_;
  if (end - first < h) D = reshape(slice(reshape(D, {config_.copies, h}), 1, first, end), {config_.copies * (end - first)});
  const Variable K = kernel(forward_, l, first, end);
  const Variable K1 = config_.bidirectional ? kernel(reverse_, l, first, end) : Variable();
  return fft_conv(u, K, D, K1, segments);
}

// The same as a recurrence that goes on from `carried` (b, copies (end - first), states), and leaves its state there.
Variable S4::scan(const Variable& x, int64_t first, int64_t end, const Tensor& segments, Tensor& carried) const {
  const int64_t h = forward_.log_dt.variable().size(0);
  Variable D = D_;
  if (end - first < h) D = reshape(slice(reshape(D, {config_.copies, h}), 1, first, end), {config_.copies * (end - first)});
  const Values v = values(forward_, first, end);
  const auto [y, last] = s4_scan(repeated(x), discretised(v), v.C.size() == 1 ? v.C[0] : concat(v.C, 0), D, Variable(carried), segments);
  carried = last.data();
  return y;
}

// A convolution over all of L needs whole sequences: of an equal share of the channels or of the rows, else of shares of
// the channels that differ, the last ones filled up with channels of zeros that are sent but not computed.
Variable S4::over_ranks(const Variable& x, const SequenceInfo& info, LayerState* state) const {
  const int64_t S = sequence_->size(), b = x.size(0), l = x.size(1), h = x.size(2);
  if (h % S != 0 && b % S == 0)
    return over_rows(x, info, sequence_, [&](const Variable& rows, const SequenceInfo& whole) {
      if (!state) return convolution(rows, 0, h, whole.segments);
      Tensor carried = own_part_of(state->tensors.at("x"), 0, *sequence_);
      const Variable y = scan(rows, 0, h, whole.segments, carried);
      state->tensors.at("x") = comm::all_gather(carried, 0, *sequence_);
      return y;
    });
  const int64_t own = (h + S - 1) / S, fill = own * S - h;
  const Variable filled = fill == 0 ? x : concat({x, Variable(zeros({b, l, fill}, x.dtype(), x.device()))}, 2);
  const Variable mine = all_to_all(filled, 2, 1, sequence_);
  const int64_t first = std::min(h, sequence_->rank() * own), count = std::min(own, h - first);
  const Tensor segments = gather_info(info, *sequence_).segments;
  Vars parts;
  if (count == 0) {  // all members use all parameters, in one order: ranks may hold them together (ZeRO-3)
    values(forward_, 0, h);
    if (config_.bidirectional) values(reverse_, 0, h);
    D_.variable();
  }
  const Shape of_copies = state ? state->tensors.at("x").view({b, config_.copies, h, n_, 2}).shape() : Shape{};
  Tensor share = state ? zeros(of_copies.with(2, own), state->tensors.at("x").dtype(), x.device()) : Tensor();
  if (count > 0) {
    const Variable own_channels = count == own ? mine : slice(mine, 2, 0, count);
    Variable y;
    if (state) {
      Tensor carried = state->tensors.at("x").view(of_copies).slice(2, first, first + count).reshape({b, config_.copies * count, n_, 2});
      y = scan(own_channels, first, first + count, segments, carried);
      Tensor place = share.slice(2, 0, count);
      copy_(place, carried.view(of_copies.with(2, count)));
    } else {
      y = convolution(own_channels, first, first + count, segments);
    }
    parts.push_back(reshape(y, {b, S * l, config_.copies, count}));
  }
  if (state)
    state->tensors.at("x") = comm::all_gather(share, 2, *sequence_).slice(2, 0, h).reshape({b, config_.copies * h, n_, 2});
  if (count < own)  // their zeros come back, so that every member's backward has the exchange
    parts.push_back(expand(unsqueeze(slice(mine, 2, count, own), 2), {b, S * l, config_.copies, own - count}));
  const Variable back = all_to_all(parts.size() == 1 ? parts[0] : concat(parts, 3), 1, 3, sequence_);
  return reshape(fill == 0 ? back : slice(back, 3, 0, h), {b, l, config_.copies * h});
}

Variable S4::repeated(const Variable& x) const {
  return config_.copies == 1 ? x : concat(Vars(static_cast<size_t>(config_.copies), x), 2);
}

// Zeros where there is padding: the kernel from the right would bring it to the positions before.
Variable S4::without_padding(const Variable& x, const Tensor& lengths) const {
  if (!config_.bidirectional || !lengths.defined()) return x;
  const int64_t l = x.size(1), before = sequence_->rank() * l;
  const Tensor places = arange(before + l, DType::i64, x.device()).slice(0, before, before + l);
  const Tensor counts = kernels::less(places, lengths.to(DType::i64).view({-1, 1}));
  return where(counts.view({x.size(0), l, 1}), x, Variable(zeros({}, x.dtype(), x.device())));
}

Variable S4::forward(const Variable& padded, const SequenceInfo& info, LayerState* state) {
  const Variable whole = without_padding(padded, info.lengths), x = scatter_to_group(whole, 2, tensor_);
  if (sequence_->size() > 1) {
    if (state) {
      check_recurrent();
      KRAIT_CHECK(config_.form == "diagonal", "s4: a carried state goes over ranks for diagonal systems only; set data.state: "
                  "reset, parallelism.sequence: 1, or use the layer s4d");
      for (const char* name : {"A_bar", "B_bar", "C"}) state->tensors.erase(name);
      state->length += x.size(1) * sequence_->size();
    }
    return output(over_ranks(x, info, state));
  }
  if (state) return output(recurrent(repeated(x), info.segments, *state));
  return output(convolution(x, 0, x.size(2), info.segments));
}

// The system of every output channel, with gradients for the diagonal form.
DiscreteSystem S4::discretised(const Values& p) const {
  DiscreteSystem s;
  if (config_.form == "dense") {
    const DenseSystem d = dense_ssm_discretize(p.log_dt, p.A, p.B, discretization_of(config_));
    const DType dtype = p.C[0].dtype();
    s.A = cast(d.A_bar, dtype);
    s.B = cast(d.B_bar, dtype);
  } else if (config_.form == "diagonal") {
    s = s4d_discretize(p.log_dt, p.log_A_re, p.A_im, p.B, discretization_of(config_));
  } else {
    s = s4_discretize(p.log_dt, p.log_A_re, p.A_im, p.P, p.B);
  }
  const auto repeat = [&](Variable& v) {
    if (v.defined() && config_.copies > 1) v = concat(Vars(static_cast<size_t>(config_.copies), v), 0);
  };
  repeat(s.A), repeat(s.B), repeat(s.M), repeat(s.Q);
  return s;
}

kernels::S4System S4::system_of(LayerState& state) const {
  auto& t = state.tensors;
  if (!t.count("A_bar")) {
    const NoGrad guard;
    const DiscreteSystem s = discretised(values(forward_, 0, h_));
    t["A_bar"] = s.A.data();
    t["B_bar"] = s.B.data();
    Tensor C = forward_.C.variable().data();
    if (config_.form == "dplr") {
      t["M"] = s.M.data();
      t["Q"] = s.Q.data();
      const System& p = forward_;
      Tensor recovered = empty_like(C);
      for (int64_t row = 0; row < C.size(0); row += h_) {
        Tensor rows = recovered.slice(0, row, row + h_);
        copy_(rows, kernels::s4_tilde_to_c({p.log_dt.variable().data(), p.log_A_re.variable().data(),
                                            p.A_im.variable().data(), p.P.variable().data(), p.B.variable().data(),
                                            C.slice(0, row, row + h_)},
                                           l_max_));
      }
      C = recovered;
    }
    t["C"] = C;
  }
  const auto optional = [&](const char* name) { return t.count(name) ? t.at(name) : Tensor(); };
  return {t.at("A_bar"), t.at("B_bar"), t.at("C"), D_.variable().data(), optional("M"), optional("Q")};
}

void S4::check_recurrent() const {
  KRAIT_CHECK(!config_.bidirectional, "s4: a bidirectional layer has no state: it needs the whole sequence at once; "
              "set bidirectional: false, or data.state: reset");
}

Variable S4::recurrent(const Variable& u, const Tensor& segments, LayerState& state) const {
  check_recurrent();
  Tensor& x = state.tensors.at("x");
  state.length += u.size(1);
  const bool wanted = recording() && (u.requires_grad() || forward_.C.variable().requires_grad());
  if (wanted) {
    KRAIT_CHECK(config_.form == "diagonal", "s4: training with a carried state is there for diagonal systems only; set "
                "data.state: reset, or use the layer s4d");
    for (const char* name : {"A_bar", "B_bar", "C"}) state.tensors.erase(name);  // the next step changes them
    const auto [y, last] = s4_scan(u, discretised(values(forward_, 0, h_)), forward_.C, D_, Variable(x), segments);
    x = last.data();
    return y;
  }
  const kernels::S4System s = system_of(state);
  auto out = config_.form == "dense" ? kernels::dense_scan_forward(u.data(), s, x, segments)
                                     : kernels::s4_scan_forward(u.data(), s, x, segments);
  x = out.last;
  return Variable(out.y);
}

Tensor S4::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  require_no_state("s4", &state, *sequence_);
  if (config_.form == "dense" || (training() && config_.dropout > 0)) return forward(Variable(x), {}, &state).data();
  check_recurrent();
  using kernels::Activation;
  std::optional<Activation> f;
  if (config_.activation != "none") f = config_.activation == "gelu" ? Activation::gelu_erf : Activation::silu;
  const Tensor u = scatter_to_group(Variable(x), 2, tensor_).data().select(1, 0);
  const Tensor y = kernels::s4_step(state.tensors.at("x"), u, system_of(state), f);
  ++state.length;
  if (config_.final_act == "glu" && tensor_->size() == 1)
    return kernels::glu_linear(y, out_weight_.variable().data(), out_bias_.variable().data()).unsqueeze(1);
  return mixed(Variable(y.unsqueeze(1))).data();
}

LayerState S4::initial_state(int64_t batch, int64_t, DType dtype, Device device) const {
  LayerState s;
  Shape shape{batch, config_.copies * h_, n_};
  if (config_.form != "dense") shape.push_back(2);
  s.tensors["x"] = zeros(shape, accum_dtype(dtype), device);
  return s;
}

// Two transforms of n >= context points: 10 n log2 n, and 6 n for the product. C has the shape of a matrix but no
// product with a token: what is counted for it is taken off.
double S4::extra_flops_per_token(int64_t context) const {
  const int log2n = kernels::fft_conv_log2(context);
  const double points = static_cast<double>(int64_t{1} << log2n) / static_cast<double>(std::max<int64_t>(1, context));
  const double convolution = static_cast<double>(config_.copies * channels()) * points * (10.0 * log2n + 6.0);
  const int64_t counted = forward_.C.shape().numel() + (config_.bidirectional ? reverse_.C.shape().numel() : 0);
  return convolution - 2.0 * static_cast<double>(counted);
}

std::string S4::kernel_name(int64_t batch, int64_t context, DType dtype, Device device, bool has_segments) const {
  if (const int ranks = sequence_->size(); ranks > 1)
    return fmt::format("whole sequences, all-to-all by {} over {} ranks",
                       h_ % ranks == 0 ? "channels" : batch % ranks == 0 ? "rows" : "channels (unequal shares)", ranks);
  const char* how = config_.form == "dense" ? "dense kernel by matrix powers (slow control)"
                    : config_.form == "dplr" ? "Cauchy kernel" : "Vandermonde kernel";
  return fmt::format("{} of {} states ({}), {}", how, config_.d_state, config_.discretization,
                     kernels::fft_conv_kernel_name(context, dtype, device, has_segments));
}

namespace {

template <bool diagonal>
LayerKind kind_of() {
  return {diagonal ? "s4d" : "s4",
          [](ConfigNode& section, const ModelConfig& model) {
            read_s4_config(section, diagonal ? "s4d" : "s4", model.d_model, model.dropout,
                           model.type == "language_model");
          },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<S4>(
                read_s4_config(options, diagonal ? "s4d" : "s4", context.d_model, context.dropout), context);
          }};
}

}  // namespace

LayerKind s4_kind() { return kind_of<false>(); }
LayerKind s4d_kind() { return kind_of<true>(); }

}  // namespace krait::layers
