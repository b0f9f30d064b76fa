#include "train/run_state.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "train/run_directory.h"

namespace krait::train {

std::string to_json(const RunState& s) {
  nlohmann::json j{{"step", s.step}, {"tokens", s.tokens}, {"time_s", s.time_s}};
  if (s.best) {
    auto& best = j["best"] = {{"step", s.best->step}, {"tokens", s.best->tokens}, {"split", s.best->split},
                              {"nll", s.best->nll},   {"time_s", s.best->time_s}};
    if (s.best->bpb) best["bpb"] = *s.best->bpb;
    if (s.best->accuracy) best["accuracy"] = *s.best->accuracy;
    if (s.best->rmse) best["rmse"] = *s.best->rmse;
  }
  return j.dump();
}

RunState run_state_from_json(const std::string& json, const std::string& where) {
  try {
    const auto j = nlohmann::json::parse(json);
    RunState s;
    s.step = j.at("step");
    s.tokens = j.at("tokens");
    s.time_s = j.at("time_s");
    if (j.contains("best") && j.at("best").at("nll").is_number()) {  // null: a diverged run's, of earlier versions
      const auto& b = j.at("best");
      EvalMetrics m;
      m.step = b.at("step");
      m.tokens = b.at("tokens");
      m.split = b.at("split");
      m.nll = b.at("nll");
      if (b.contains("bpb")) m.bpb = b.at("bpb").get<double>();
      if (b.contains("accuracy")) m.accuracy = b.at("accuracy").get<double>();
      if (b.contains("rmse")) m.rmse = b.at("rmse").get<double>();
      m.time_s = b.at("time_s");
      s.best = m;
    }
    return s;
  } catch (const nlohmann::json::exception& e) {
    throw_error(fmt::format("{}: the checkpoint's meta data are damaged: {}", where, e.what()));
  }
}

namespace {

constexpr const char* kTokenizer = "tokenizer";

/// What a rank has of a parameter's part.
struct PartPiece {
  std::string name;
  TensorPiece piece;
  bool is_whole = false;
  Ranges own;  // the same elements in buffers of the rank's own
};

/// For writing only what no other rank writes: of replicas each a share of the flat buffers.
std::vector<PartPiece> part_pieces(const Session& session, const ParameterShards& shards, bool for_writing) {
  const int64_t n = shards.numel(), ranks = session.mesh.replicas->size(), rank = session.mesh.replicas->rank();
  const bool share = for_writing && !shards.sharded();
  const int64_t own_begin = share ? n * rank / ranks : 0, own_end = share ? n * (rank + 1) / ranks : n;
  std::vector<PartPiece> out;
  for (const ParameterShards::Part& part : shards.parts()) {
    const int64_t numel = part.local.numel();
    PartPiece p{part.name, {part.whole, part.shard.dim, {}, {}}, false, {}};
    Ranges kept;  // of the local part's elements
    const bool by_rows = part.shard.dim == 0 && part.local.ndim() > 0;
    int64_t at = 0;
    for (const layers::ShardRange& r : part.shard.ranges) {
      p.piece.ranges.push_back({r.begin, r.end});
      const int64_t length = by_rows ? (r.end - r.begin) * (numel / std::max<int64_t>(part.local[0], 1))
                             : at == 0 ? numel : 0;  // cut along another dimension all ranges are alike
      if (length > 0 && (r.primary || !for_writing)) kept.push_back({at, at + length});
      at += length;
    }
    for (const auto& [begin, end] : kept)
      for (const ParameterShards::Piece& own : shards.cut(part.offset + begin, part.offset + end)) {
        const int64_t first = std::max(own.at, own_begin), last = std::min(own.at + own.end - own.begin, own_end);
        if (first >= last) continue;
        const int64_t element = own.begin - part.offset + first - own.at;
        p.piece.flat.push_back({element, element + last - first});
        p.own.push_back({first, last});
      }
    if (for_writing && p.own.empty() && numel > 0) continue;
    p.is_whole = part.local == part.whole && (numel == 0 || (p.own.size() == 1 && p.own[0].second - p.own[0].first == numel));
    out.push_back(std::move(p));
  }
  return out;
}

/// The piece's values in one tensor: a view where they lie together.
NamedTensor tensor_of(const PartPiece& p, const Tensor& own, const std::string& prefix) {
  if (p.is_whole) {
    const int64_t begin = p.own.empty() ? 0 : p.own[0].first;
    return {prefix + p.name, own.slice(0, begin, begin + p.piece.whole.numel()).view(p.piece.whole)};
  }
  if (p.own.size() == 1) return {prefix + p.name, own.slice(0, p.own[0].first, p.own[0].second), p.piece};
  int64_t n = 0;
  for (const auto& [begin, end] : p.own) n += end - begin;
  const Tensor all = empty({n}, own.dtype(), kCpu);
  int64_t at = 0;
  for (const auto& [begin, end] : p.own) {
    Tensor place = all.slice(0, at, at + end - begin);
    copy_(place, own.slice(0, begin, end));
    at += end - begin;
  }
  return {prefix + p.name, all, p.piece};
}

/// Back from where tensor_of() had to copy.
void put_back(const PartPiece& p, Tensor own, const NamedTensor& t) {
  if (p.is_whole || p.own.size() == 1) return;
  int64_t at = 0;
  for (const auto& [begin, end] : p.own) {
    Tensor place = own.slice(0, begin, end);
    copy_(place, t.value.slice(0, at, at + end - begin));
    at += end - begin;
  }
}

/// The rank's flat buffers by the prefix of their names in a checkpoint; counters are stored as they are.
struct Flat {
  std::string prefix;
  Tensor own;
};
std::vector<Flat> flat_buffers(TrainStep& step) {
  std::vector<Flat> out{{"model.", step.shards().master()}};
  for (const auto& [name, value] : step.optimizer().state())
    if (value.numel() == step.shards().numel() && value.ndim() == 1) out.push_back({name + ".", value});
  return out;
}

std::vector<NamedTensor> counters(TrainStep& step) {
  std::vector<NamedTensor> out;
  for (const auto& [name, value] : step.optimizer().state())
    if (value.numel() != step.shards().numel() || value.ndim() != 1) out.push_back({name, value});
  return out;
}

// Each data rank has rows of its own, and each member of a tensor group its channels of them: the first member's of all
// rows, then the second's, ... Members of a sequence group have the same.
std::vector<NamedTensor> carried_tensors(const Session& session, const CarriedState* carried, bool for_writing) {
  std::vector<NamedTensor> out;
  if (!carried || (for_writing && session.mesh.sequence->rank() > 0)) return out;
  const comm::Mesh& mesh = session.mesh;
  const int64_t ranks = mesh.data->size() * mesh.tensor->size();
  const int64_t rank = mesh.tensor->rank() * mesh.data->size() + mesh.data->rank();
  for (const auto& [name, value] : carried->named()) {
    const int64_t rows = value.size(0);
    NamedTensor t{"state." + name, value};
    if (ranks > 1)
      t.piece = TensorPiece{value.shape().with(0, rows * ranks), 0, {{rank * rows, (rank + 1) * rows}}, {{0, value.numel()}}};
    out.push_back(std::move(t));
  }
  return out;
}

}  // namespace

std::vector<NamedTensor> checkpoint_tensors(Session& session, TrainStep& step) {
  std::vector<NamedTensor> out;
  const std::vector<PartPiece> pieces = part_pieces(session, step.shards(), true);
  for (const Flat& flat : flat_buffers(step))
    for (const PartPiece& p : pieces) out.push_back(tensor_of(p, flat.own, flat.prefix));
  for (NamedTensor& t : carried_tensors(session, step.carried_state(), true)) out.push_back(std::move(t));
  if (!session.leads()) return out;
  for (NamedTensor& t : counters(step)) out.push_back(std::move(t));
  if (!session.data.tokenizer) return out;
  const std::string blob = session.data.tokenizer->serialize();
  out.push_back({kTokenizer, from_vector(std::vector<uint8_t>(blob.begin(), blob.end()))});
  return out;
}

namespace {

void read_group(const CheckpointReader& reader, const std::vector<NamedTensor>& targets, const std::string& prefix) {
  std::vector<NamedTensor> bare;
  for (const NamedTensor& t : targets)
    if (t.name.starts_with(prefix)) bare.push_back({t.name.substr(prefix.size()), t.value, t.piece});
  reader.read_into(bare, prefix);
}

}  // namespace

void load_model(Session& session, const CheckpointReader& reader) {
  std::vector<NamedTensor> targets;
  for (const auto& p : session.parameters->named_masters()) targets.push_back({"model." + p.name, p.value});
  read_group(reader, targets, "model.");
  session.parameters->refresh_compute();
}

namespace {

// Other ids for the same text would train on without a word. The checkpoint's tokenizer is the only one that its embedding fits.
void check_tokenizer(const Session& session, const CheckpointReader& reader) {
  if (!session.data.tokenizer || !reader.has(kTokenizer)) return;
  const data::TokenizerPtr before = load_checkpoint_tokenizer(reader), now = session.data.tokenizer;
  KRAIT_CHECK(before->serialize() == now->serialize(),
              "{}: was trained with another tokenizer ({}, {} ids) than that of {} ({}, {} ids)\n"
              "       try data prepared with --tokenizer-from the run's first data, or a new --run-dir",
              reader.path(), before->name(), before->vocab_size(), session.data.store->path(), now->name(), now->vocab_size());
}

}  // namespace

void load_run(Session& session, TrainStep& step, const CheckpointReader& reader) {
  check_tokenizer(session, reader);
  std::vector<NamedTensor> targets = counters(step);
  const std::vector<PartPiece> pieces = part_pieces(session, step.shards(), false);
  const std::vector<Flat> flats = flat_buffers(step);
  const size_t first = targets.size();
  for (const Flat& flat : flats)
    for (const PartPiece& p : pieces) targets.push_back(tensor_of(p, flat.own, flat.prefix));
  read_group(reader, targets, "optimizer.");
  if (step.carried_state()) {
    const std::vector<NamedTensor> carried = carried_tensors(session, step.carried_state(), false);
    try {
      read_group(reader, carried, "state.");
    } catch (const Error& e) {
      throw Error(fmt::format("{}\n       with data.state: carry a run keeps its rows: train.micro_batch_size x data ranks "
                              "and parallelism.tensor must stay what they were", e.what()));
    }
  }
  read_group(reader, targets, "model.");
  size_t i = first;
  for (const Flat& flat : flats)
    for (const PartPiece& p : pieces) put_back(p, flat.own, targets[i++]);
  step.shards().refresh();
}

data::TokenizerPtr load_checkpoint_tokenizer(const CheckpointReader& reader) {
  const auto bytes = reader.read(kTokenizer).to_vector<uint8_t>();
  return data::load_tokenizer(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()),
                              reader.path());
}

std::optional<CheckpointInfo> find_checkpoint(decltype(latest_checkpoint) find, const std::string& directory, const char* advice) {
  std::vector<std::string> skipped;
  const auto found = find(directory, &skipped);
  for (const std::string& message : skipped) std::fputs(fmt::format("warning: {}\n", message).c_str(), stderr);
  KRAIT_CHECK(found || skipped.empty(), "{}: every checkpoint is damaged{}", directory, advice);
  return found;
}

LoadedRun load_finished_run(const std::string& run_dir, const std::vector<std::string>& overrides) {
  const RunDirectory directory = RunDirectory::open(run_dir);
  const Config config = load_config(directory.config_file(), overrides);
  const auto found = find_checkpoint(best_checkpoint, directory.checkpoints(), "; restore one");
  KRAIT_CHECK(found, "{}: no checkpoint; train it further with krait train {} --run-dir {} --resume",
              directory.checkpoints(), directory.config_file(), run_dir);
  const CheckpointReader reader(found->path);
  DataSource data;
  if (config.data.task)
    data = open_data(config);
  else
    data.tokenizer = load_checkpoint_tokenizer(reader);
  LoadedRun run{make_session(config, std::move(data), reader.step(), comm::single_mesh(), false), reader.step(), found->path};
  load_model(run.session, reader);
  return run;
}

}  // namespace krait::train
