#include <algorithm>
#include <map>
#include <set>

#include "kernels/cuda/step_solo.h"

namespace krait::kernels::cuda {

namespace {

int even_share(int total, int blocks) { return ((total + blocks - 1) / blocks + 1) / 2 * 2; }

class Planner {
 public:
  Planner(SoloProgram& solo, const StepProgram& program, int blocks) : solo_(solo), program_(program), blocks_(blocks) {}

  bool plan() {
    solo_.count = solo_.packages = 0;
    for (int i = 0; i < program_.count;) {
      const StepOp& op = program_.ops[i];
      if (op.rows != 1 || solo_.count >= kMaxSoloOps) return false;
      int used = 0;
      switch (op.kind) {
        case StepKind::linear: used = linear(i); break;
        case StepKind::attention: used = attention(op); break;
        default: break;  // mixers are taken together with the map before them
      }
      if (used == 0) return false;
      i += used;
    }
    for (int i = 0; i < solo_.count; ++i) {
      SoloLinear& a = solo_.ops[i].linear;
      if (solo_.ops[i].kind == SoloKind::linear && a.kept == 0 && !read_.contains(a.slot)) a.published_end = a.published;
    }
    return true;
  }

 private:
  // Operations that this one and what belongs to it take; 0: it is none for the kernel.
  int linear(int at) {
    const StepOp& op = program_.ops[at];
    const LinearStep& l = op.linear;
    const StepOp* const next = at + 1 < program_.count ? &program_.ops[at + 1] : nullptr;
    const StepOp* const third = at + 2 < program_.count ? &program_.ops[at + 2] : nullptr;
    SoloOp& out = begin(SoloKind::linear);
    SoloLinear& a = out.linear;
    if (!map(a, op)) return 0;
    if (next != nullptr && third != nullptr && next->kind == StepKind::linear && next->linear.input == StepInput::convolved &&
        next->convolved.xz == l.y && third->kind == StepKind::mamba_scan && third->scan.xz == l.y)
      return mamba(a, next[0], third[0]) ? 3 : 0;
    if (next != nullptr && third != nullptr && next->kind == StepKind::mamba2_state && next->state.zxbcdt == l.y &&
        third->kind == StepKind::linear && third->linear.input == StepInput::gated && third->gated.u == next->state.u)
      return mamba2(a, next[0], third[0]) ? 3 : 0;
    a.segment[0] = {0, l.n, even_share(l.n, blocks_), 0};
    return publish(a, 0, l.n) && lay(a) ? 1 : 0;
  }

  // In and out of a linear map; not yet which columns go where.
  bool map(SoloLinear& a, const StepOp& op) {
    const LinearStep& l = op.linear;
    if (l.k % 8 != 0 || l.k > kSoloWidth || l.n >= (1 << 22)) return false;
    a.w = l.w;
    a.bias = l.bias;
    a.y = l.y;
    a.k = l.k;
    a.epilogue = l.epilogue;
    a.input = l.input;
    if (l.input == StepInput::plain) return source(a.x, l.x);
    if (l.input == StepInput::gated) return true;
    if (l.input != StepInput::norm || l.k > 4 * kSoloThreads) return false;
    const NormStep& n = op.norm;
    if (!source(a.x, n.x)) return false;
    const bool holds = n.residual != nullptr && n.residual == held_;
    if (n.residual != nullptr && !holds && made_.contains(n.residual)) return false;
    a.norm = {holds ? nullptr : n.residual, holds ? 1 : 0, n.centred, n.y, n.sum, n.mean, n.rstd, n.w, n.b, n.eps};
    held_ = n.residual != nullptr ? n.sum : n.x;
    for (const void* p : {static_cast<const void*>(n.y), static_cast<const void*>(n.sum)})
      if (p != nullptr) made_.insert(p);
    return true;
  }

  bool mamba(SoloLinear& in, const StepOp& project, const StepOp& scan) {
    const ScanStep& s = scan.scan;
    const int each = even_share(s.e, blocks_);
    if (in.epilogue != Epilogue::none || s.e % 2 != 0 || each > kSoloKept || (s.r + 2 * s.n) % 4 != 0 || s.r + 2 * s.n > kSoloMixed || !once(s.conv) || !once(s.h))
      return false;
    in.segment[0] = {0, s.e, each, 0};
    in.segment[1] = {s.e, s.e, each, 0};
    in.kept = 2;
    in.conv = s.conv;
    in.conv_weight = s.conv_weight;
    in.conv_bias = s.conv_bias;
    in.conv_first = 0;
    in.channels = s.e;
    if (!publish(in, 0, s.e) || !lay(in)) return false;
    const int mixed = in.slot;
    if (solo_.count + 2 > kMaxSoloOps) return false;
    SoloLinear& x = begin(SoloKind::linear).linear;
    const LinearStep& l = project.linear;
    if (l.k % 8 != 0 || l.k > kSoloWidth) return false;
    x.w = l.w;
    x.bias = l.bias;
    x.y = l.y;
    x.k = l.k;
    x.epilogue = l.epilogue;
    x.input = StepInput::plain;
    x.x = {nullptr, mixed};
    x.segment[0] = {0, l.n, even_share(l.n, blocks_), 0};
    if (!publish(x, 0, l.n) || !lay(x)) return false;
    read_.insert(x.slot);
    SoloScan& out = begin(SoloKind::scan).scan;
    out = {{nullptr, x.slot}, 0, s.e, each, s.n, s.r, s.y, s.h, s.dt_proj, s.dt_bias, s.A_log, s.D};
    return slots(out.slot, s.e) && made(s.y, out.slot);
  }

  bool mamba2(SoloLinear& in, const StepOp& state, const StepOp& last) {
    const StateStep& s = state.state;
    const int e = s.heads * s.p, each = even_share(e, blocks_), rest = s.input - 2 * e;
    if (in.epilogue != Epilogue::none || in.bias != nullptr || s.groups != 1 || e % 2 != 0 || each > kSoloKept || s.n % 4 != 0 || s.n > 256 || e > 4 * kSoloThreads || s.heads % 4 != 0 ||
        s.channels != e + 2 * s.n || rest != 2 * s.n + s.heads || !once(s.conv) || !once(s.h))
      return false;
    in.segment[0] = {e, e, each, 0};
    in.segment[1] = {0, e, each, 0};
    in.segment[2] = {2 * e, rest, even_share(rest, blocks_), 1};
    in.kept = 2;
    in.conv = const_cast<bf16*>(s.conv);
    in.conv_weight = s.conv_weight;
    in.conv_bias = s.conv_bias;
    in.conv_first = e;
    in.channels = s.channels;
    if (!publish(in, 2 * e, s.input) || !lay(in) || solo_.count + 2 > kMaxSoloOps) return false;
    SoloState& out = begin(SoloKind::state).state;
    out = {{nullptr, in.slot}, 0, e, each, s.n, s.p, s.D_columns, s.u, s.h, s.dt_bias, s.A_log, s.D, s.low, s.high};
    if (!slots(out.slot, 2 * e)) return false;
    const int both = out.slot;
    SoloLinear& l = begin(SoloKind::linear).linear;
    if (!map(l, last)) return false;
    l.x = {nullptr, both};
    l.gate = {last.gated.y, last.gated.w, last.gated.eps, last.gated.norm_first};
    l.segment[0] = {0, last.linear.n, even_share(last.linear.n, blocks_), 0};
    return publish(l, 0, last.linear.n) && lay(l);
  }

  int attention(const StepOp& op) {
    const AttentionStep& a = op.attention;
    SoloAttention& out = begin(SoloKind::attention).attention;
    if (a.d > kSoloHeadDim || a.hq > blocks_ || !once(a.k_cache) || !once(a.v_cache) || !source(out.qkv, a.qkv)) return 0;
    out.of = a;
    return slots(out.slot, a.hq * a.d) && made(a.o, out.slot) ? 1 : 0;
  }

  SoloOp& begin(SoloKind kind) {
    SoloOp& op = solo_.ops[solo_.count++];
    op = SoloOp{};
    op.kind = kind;
    return op;
  }
  bool slots(int& slot, int values) {
    slot = pairs_;
    pairs_ += (values / 2 + 16) / 16 * 16;  // whole lines
    return pairs_ <= kSoloSlotPairs;
  }
  bool made(const bf16* values, int slot) {
    slot_[values] = slot;
    return made_.insert(values).second;
  }
  bool publish(SoloLinear& a, int begin, int end) {
    a.published = begin;
    a.published_end = end;
    if (!slots(a.slot, end - begin)) return false;
    if (a.kept == 0) slot_[a.y] = a.slot;  // else only what belongs to it knows where its values are
    return made_.insert(a.y).second;
  }
  bool once(const void* state) { return states_.insert(state).second; }
  bool source(SoloSource& s, const bf16* values) {
    const auto at = slot_.find(values);
    s = {values, at == slot_.end() ? -1 : at->second};
    read_.insert(s.slot);
    return at != slot_.end() || !made_.contains(values);
  }

  // Warps and packages of the ring.
  bool lay(SoloLinear& a) {
    for (const SoloSegment& s : a.segment) a.columns += s.each;
    const int pairs = (a.columns + 1) / 2, pieces = a.k / 8;
    const auto turns = [&](int split) { return ((pieces + split - 1) / split + 31) / 32; };
    const int most = std::clamp(kSoloWarps / pairs, 1, kSoloWarps);
    a.split = 1;
    for (int split = 2; split <= most; ++split)
      if (turns(split) < turns(a.split)) a.split = split;
    a.groups = kSoloWarps / a.split;
    a.share = (pieces + a.split - 1) / a.split * 8;
    a.inverse = (255 + a.groups) / a.groups;
    const int bytes = 2 * a.k;
    a.per = std::min(a.columns, kSoloPackage / bytes / 2 * 2);
    if (a.per > 2 * a.groups) a.per = a.per / (2 * a.groups) * 2 * a.groups;
    if (a.per < 2) return false;
    a.packages = (a.columns + a.per - 1) / a.per;
    a.package = solo_.packages;
    for (int i = 0; i < a.packages; ++i)
      if (!place(std::min(a.per, a.columns - i * a.per) * bytes)) return false;
    return true;
  }
  bool place(int bytes) {
    const int i = solo_.packages++;
    if (i >= kMaxSoloPackages) return false;
    bytes = (bytes + 127) / 128 * 128;
    if (ring_ + bytes > kSoloRing) ring_ = 0;
    int after = i - kSoloTurns;
    for (int j = std::max(after, 0); j < i; ++j)
      if (solo_.package[j].offset < ring_ + bytes && ring_ < solo_.package[j].offset + size_[j]) after = std::max(after, j);
    solo_.package[i] = {ring_, after};
    size_[i] = bytes;
    ring_ += bytes;
    return true;
  }

  SoloProgram& solo_;
  const StepProgram& program_;
  int blocks_, pairs_ = 0, ring_ = 0;
  int size_[kMaxSoloPackages] = {};
  const bf16* held_ = nullptr;
  std::map<const void*, int> slot_;  // values of the program, by the tensor that they belong to
  std::set<const void*> made_, states_;
  std::set<int> read_;
};

}  // namespace

bool plan_solo(SoloProgram& solo, const StepProgram& program, int blocks) { return Planner(solo, program, blocks).plan(); }

}  // namespace krait::kernels::cuda
