#include "train/run_state.h"

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
    if (j.contains("best")) {
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

// State that is laid out like the parameters is stored per parameter; the rest (counters) as it is.
std::vector<NamedTensor> optimizer_tensors(const Session& session, const Optimizer& optimizer) {
  std::vector<NamedTensor> out;
  for (const auto& [name, value] : optimizer.state()) {
    if (value.numel() != session.parameters->numel() || value.ndim() != 1) {
      out.push_back({name, value});
      continue;
    }
    for (const auto& part : session.parameters->named(value)) out.push_back({name + "." + part.name, part.value});
  }
  return out;
}

std::vector<NamedTensor> carried_tensors(const CarriedState* carried) {
  std::vector<NamedTensor> out;
  if (carried)
    for (const auto& [name, value] : carried->named()) out.push_back({"state." + name, value});
  return out;
}

}  // namespace

std::vector<NamedTensor> model_tensors(Session& session) {
  std::vector<NamedTensor> out;
  for (const auto& p : session.parameters->named_masters()) out.push_back({"model." + p.name, p.value});
  return out;
}

std::vector<NamedTensor> checkpoint_tensors(Session& session, const Optimizer& optimizer, const CarriedState* carried) {
  std::vector<NamedTensor> out = model_tensors(session);
  for (NamedTensor& t : optimizer_tensors(session, optimizer)) out.push_back(std::move(t));
  for (NamedTensor& t : carried_tensors(carried)) out.push_back(std::move(t));
  if (!session.data.tokenizer) return out;
  const std::string blob = session.data.tokenizer->serialize();
  out.push_back({kTokenizer, from_vector(std::vector<uint8_t>(blob.begin(), blob.end()))});
  return out;
}

namespace {

void read_group(const CheckpointReader& reader, const std::vector<NamedTensor>& targets, const std::string& prefix) {
  std::vector<NamedTensor> bare;
  for (const NamedTensor& t : targets) bare.push_back({t.name.substr(prefix.size()), t.value});
  reader.read_into(bare, prefix);
}

}  // namespace

void load_model(Session& session, const CheckpointReader& reader) {
  read_group(reader, model_tensors(session), "model.");
  session.parameters->refresh_compute();
}

void load_run(Session& session, Optimizer& optimizer, const CarriedState* carried, const CheckpointReader& reader) {
  read_group(reader, optimizer_tensors(session, optimizer), "optimizer.");
  if (carried) read_group(reader, carried_tensors(carried), "state.");
  load_model(session, reader);
}

data::TokenizerPtr load_checkpoint_tokenizer(const CheckpointReader& reader) {
  const auto bytes = reader.read(kTokenizer).to_vector<uint8_t>();
  return data::load_tokenizer(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()),
                              reader.path());
}

LoadedRun load_finished_run(const std::string& run_dir, const std::vector<std::string>& overrides) {
  const RunDirectory directory = RunDirectory::open(run_dir);
  const Config config = load_config(directory.config_file(), overrides);
  std::vector<std::string> skipped;
  const auto found = best_checkpoint(directory.checkpoints(), &skipped);
  for (const std::string& message : skipped) fmt::print(stderr, "warning: {}\n", message);
  KRAIT_CHECK(found, "{}: no whole checkpoint; train it further with krait train {} --run-dir {} --resume",
              directory.checkpoints(), directory.config_file(), run_dir);
  const CheckpointReader reader(found->path);
  DataSource data;
  if (config.data.task)
    data = open_data(config);
  else
    data.tokenizer = load_checkpoint_tokenizer(reader);
  LoadedRun run{make_session(config, std::move(data), reader.step()), reader.step(), found->path};
  load_model(run.session, reader);
  return run;
}

}  // namespace krait::train
