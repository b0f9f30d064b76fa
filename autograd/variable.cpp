#include "autograd/variable.h"

#include <queue>
#include <unordered_map>
#include <unordered_set>

#include "kernels/accumulate.h"

namespace krait::autograd {

struct Variable::Node {
  std::string_view name;
  uint64_t order = 0;  // position in the recording
  struct Edge {
    std::shared_ptr<Node> node;
    size_t index = 0;
  };
  std::vector<Edge> inputs;
  BackwardMany backward;
  size_t n_outputs = 1;
  std::vector<Shape> output_shapes;
  // Leaves only.
  bool leaf = false;
  Tensor grad;
  bool fixed_buffer = false;
  std::function<Tensor()> source;
  std::function<void()> ready;
  const Tensor& buffer() {
    if (!grad.defined() && source) grad = source();
    return grad;
  }
};

namespace {
thread_local bool tl_recording = true;
uint64_t next_order() {
  static thread_local uint64_t counter = 0;
  return ++counter;
}
const Tensor kUndefined;
}  // namespace

Variable::Variable(Tensor data, bool requires_grad) : data_(std::move(data)) {
  if (!requires_grad) return;
  KRAIT_CHECK(is_floating(data_.dtype()), "a {} tensor cannot require a gradient", data_.dtype());
  node_ = std::make_shared<Node>();
  node_->name = "leaf";
  node_->leaf = true;
}

bool Variable::is_leaf() const { return !node_ || node_->leaf; }
const Tensor& Variable::grad() const { return node_ && node_->leaf ? node_->buffer() : kUndefined; }

void Variable::set_grad(Tensor buffer) {
  KRAIT_CHECK(node_ && node_->leaf, "set_grad: not a leaf that requires a gradient");
  KRAIT_CHECK(buffer.shape() == data_.shape(), "set_grad: buffer {} does not match {}", buffer.shape(), data_.shape());
  node_->grad = std::move(buffer);
  node_->fixed_buffer = true;
}

void Variable::set_grad_source(std::function<Tensor()> make) {
  KRAIT_CHECK(node_ && node_->leaf, "set_grad_source: not a leaf that requires a gradient");
  node_->source = std::move(make);
  node_->fixed_buffer = true;
  node_->grad = {};
}

void Variable::drop_grad() {
  if (node_ && node_->leaf) node_->grad = {};
}

void Variable::clear_grad() {
  if (!node_ || !node_->leaf) return;
  if (node_->fixed_buffer && node_->grad.defined())
    zero_(node_->grad);
  else
    node_->grad = {};
}

bool Variable::accumulates_in_place() const { return node_ && node_->leaf && node_->fixed_buffer; }

void Variable::on_grad_ready(std::function<void()> hook) {
  KRAIT_CHECK(node_ && node_->leaf, "on_grad_ready: not a leaf that requires a gradient");
  node_->ready = std::move(hook);
}

void Variable::set_data(Tensor data) {
  KRAIT_CHECK(is_leaf(), "set_data: not a leaf");
  data_ = std::move(data);
}

Variable make_output(Tensor data, std::shared_ptr<Variable::Node> node, size_t index) {
  Variable out;
  out.data_ = std::move(data);
  out.node_ = std::move(node);
  out.index_ = index;
  return out;
}

NoGrad::NoGrad() : previous_(tl_recording) { tl_recording = false; }
NoGrad::~NoGrad() { tl_recording = previous_; }
bool recording() { return tl_recording; }
bool wants_grad(const Vars& inputs) {
  if (!tl_recording) return false;
  for (const Variable& v : inputs)
    if (v.requires_grad()) return true;
  return false;
}

Vars record(std::string_view name, const Vars& inputs, const std::vector<Tensor>& outputs, BackwardMany backward) {
  Vars result;
  if (!wants_grad(inputs)) {
    for (const Tensor& t : outputs) result.emplace_back(t);
    return result;
  }
  auto node = std::make_shared<Variable::Node>();
  node->name = name;
  node->order = next_order();
  node->backward = std::move(backward);
  node->n_outputs = outputs.size();
  for (const Variable& v : inputs) node->inputs.push_back({v.node(), v.output_index()});
  for (size_t i = 0; i < outputs.size(); ++i) {
    node->output_shapes.push_back(outputs[i].shape());
    result.push_back(make_output(outputs[i], node, i));
  }
  return result;
}

Variable record(std::string_view name, const Vars& inputs, const Tensor& output, BackwardOne backward) {
  if (!wants_grad(inputs)) return Variable(output);
  return record(name, inputs, std::vector<Tensor>{output},
                [f = std::move(backward)](const std::vector<Tensor>& dy) { return f(dy[0]); })[0];
}

void require_no_grad(std::string_view name, const Vars& inputs) {
  KRAIT_CHECK(!wants_grad(inputs), "{} has no gradient, but an input requires one; use NoGrad or detach()",
              fmt::string_view(name.data(), name.size()));
}

namespace {

using Node = Variable::Node;

// Adds `g` to `slot`; writes in place only when nobody else can see the buffer and no two elements share memory.
void add_to(Tensor& slot, bool may_write, const Tensor& g) {
  if (!slot.defined()) {
    slot = g;
    return;
  }
  if (!may_write && (slot.use_count() > 1 || !slot.is_contiguous())) slot = slot.clone();
  kernels::accumulate(slot, g);
}

struct ByOrder {
  bool operator()(const std::shared_ptr<Node>& a, const std::shared_ptr<Node>& b) const { return a->order < b->order; }
};

// How many times each leaf is an input of what the outputs depend on.
std::unordered_map<Node*, int64_t> leaf_uses(const std::vector<std::shared_ptr<Node>>& roots) {
  std::unordered_map<Node*, int64_t> uses;
  std::unordered_set<Node*> seen;
  std::vector<Node*> stack;
  for (const auto& r : roots)
    if (r && seen.insert(r.get()).second) stack.push_back(r.get());
  while (!stack.empty()) {
    Node* n = stack.back();
    stack.pop_back();
    for (const auto& e : n->inputs) {
      if (!e.node) continue;
      if (e.node->leaf)
        ++uses[e.node.get()];
      else if (seen.insert(e.node.get()).second)
        stack.push_back(e.node.get());
    }
  }
  return uses;
}

class Engine {
 public:
  void seed(const Variable& output, const Tensor& gradient) {
    if (output.node()->leaf) {
      give_leaf(*output.node(), gradient);
      return;
    }
    give(output.node(), output.output_index(), gradient);
  }

  void run(std::unordered_map<Node*, int64_t> uses) {
    uses_ = std::move(uses);
    while (!queue_.empty()) {
      const std::shared_ptr<Node> node = queue_.top();
      queue_.pop();
      auto slot = pending_.extract(node.get());
      KRAIT_CHECK(node->backward, "{}: backward ran through this function already; its saved tensors are freed",
                  fmt::string_view(node->name.data(), node->name.size()));
      Grads grads = node->backward(slot.mapped());
      node->backward = nullptr;  // frees what it saved
      slot = {};
      const auto edges = std::move(node->inputs);
      node->inputs.clear();
      KRAIT_ASSERT(grads.size() == edges.size(), "{} returned {} gradients for {} inputs.",
                   fmt::string_view(node->name.data(), node->name.size()), grads.size(), edges.size());
      for (size_t i = 0; i < edges.size(); ++i) {
        if (!edges[i].node) continue;
        Tensor g = std::move(grads[i]);
        grads[i] = {};
        if (edges[i].node->leaf) {
          if (g.defined()) give_leaf(*edges[i].node, g);
          leaf_done(*edges[i].node);
        } else if (g.defined()) {
          give(edges[i].node, edges[i].index, g);
        }
      }
    }
  }

 private:
  void give(const std::shared_ptr<Node>& node, size_t index, const Tensor& g) {
    KRAIT_ASSERT(g.shape() == node->output_shapes[index], "gradient {} for an output {} of {}.", g.shape(),
                 node->output_shapes[index], fmt::string_view(node->name.data(), node->name.size()));
    auto [it, fresh] = pending_.try_emplace(node.get(), node->n_outputs);
    if (fresh) queue_.push(node);
    add_to(it->second[index], false, g);
  }
  static void give_leaf(Node& leaf, const Tensor& g) {
    leaf.buffer();
    add_to(leaf.grad, leaf.fixed_buffer, g);
  }
  void leaf_done(Node& leaf) {
    if (--uses_[&leaf] == 0 && leaf.ready) leaf.ready();
  }

  std::priority_queue<std::shared_ptr<Node>, std::vector<std::shared_ptr<Node>>, ByOrder> queue_;
  std::unordered_map<Node*, std::vector<Tensor>> pending_;
  std::unordered_map<Node*, int64_t> uses_;
};

}  // namespace

void backward(const Vars& outputs, const std::vector<Tensor>& seeds) {
  KRAIT_CHECK(outputs.size() == seeds.size(), "backward: {} outputs but {} seeds", outputs.size(), seeds.size());
  const NoGrad guard;
  Engine engine;
  std::vector<std::shared_ptr<Node>> roots;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].requires_grad() || !seeds[i].defined()) continue;
    KRAIT_CHECK(seeds[i].shape() == outputs[i].shape(), "backward: seed {} for an output {}", seeds[i].shape(),
                outputs[i].shape());
    engine.seed(outputs[i], seeds[i]);
    roots.push_back(outputs[i].node());
  }
  engine.run(leaf_uses(roots));
}

void backward(const Variable& loss, const Tensor& seed) {
  KRAIT_CHECK(loss.requires_grad(), "backward: the loss does not depend on anything that requires a gradient");
  if (seed.defined()) return backward(Vars{loss}, {seed});
  KRAIT_CHECK(loss.data().numel() == 1, "backward: {} is not a single value; give a seed", loss.shape());
  backward(Vars{loss}, {ones(loss.shape(), loss.dtype(), loss.device())});
}

Vars recompute(const std::function<Vars(const Vars&)>& f, const Vars& inputs) {
  Vars outputs;
  {
    const NoGrad guard;
    outputs = f(inputs);
  }
  std::vector<Tensor> values;
  for (const Variable& v : outputs) values.push_back(v.data());
  std::vector<Tensor> saved;
  std::vector<bool> wanted;
  for (const Variable& v : inputs) {
    saved.push_back(v.data());
    wanted.push_back(v.requires_grad());
  }
  return record("recompute", inputs, values, [f, saved, wanted](const std::vector<Tensor>& dy) {
    Vars again;
    for (size_t i = 0; i < saved.size(); ++i) again.emplace_back(saved[i], wanted[i]);
    Vars out;
    tl_recording = true;  // backward() runs without recording; its guard restores that
    out = f(again);
    tl_recording = false;
    backward(out, dy);
    Grads grads;
    for (const Variable& v : again) grads.push_back(v.grad());
    return grads;
  });
}

}  // namespace krait::autograd
