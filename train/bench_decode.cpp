#include "core/allocator.h"
#include "core/device_timer.h"
#include "train/bench_models.h"
#include "train/bench_run.h"
#include "train/decode.h"

namespace krait::train::bench {

namespace {

struct DecodeRow {
  const char* base;
  int64_t batch;
  bool cuda;
  double goal_ms;  // of a step
  DType states = DType::f32;
};
// Goals: 4,000 tokens/s at batch 1, 150,000 at batch 64.
constexpr DecodeRow kRows[] = {
    {"mamba-130m", 1, true, 0.25},   {"mamba-130m", 2, true, 0},      {"mamba-130m", 4, true, 0},
    {"mamba-130m", 8, true, 0},     {"mamba-130m", 64, true, 0.427},  {"mamba-130m", 256, true, 0},
    {"mamba2-130m", 1, true, 0.25},  {"mamba2-130m", 8, true, 0},  {"mamba2-130m", 64, true, 0.427}, {"mamba2-130m", 256, true, 0},
    {"mamba2-130m", 64, true, 0.427, DType::bf16},
    {"gpt2-124m", 1, true, 0.25},    {"gpt2-124m", 8, true, 0},    {"gpt2-124m", 64, true, 0},    {"gpt2-124m", 256, true, 0},
    {"llama-124m", 1, true, 0},      {"llama-124m", 8, true, 0},   {"llama-124m", 64, true, 0},   {"llama-124m", 256, true, 0},
    {"xlstm-125m", 1, true, 0},      {"xlstm-125m", 64, true, 0},  {"xlstm-125m", 256, true, 0},
    {"xlstm-125m", 64, true, 0, DType::bf16},
    {"s4d-24x768", 1, true, 0},      {"s4d-24x768", 64, true, 0},   {"s4-24x768", 1, true, 0},
    {"lstm-2x1024", 1, true, 0},     {"lstm-2x1024", 64, true, 0},  {"gru-2x1024", 1, true, 0},
    {"linear-24x768", 1, true, 0},   {"linear-24x768", 64, true, 0},
    {"gated-cnn-24x768", 1, true, 0}, {"gated-cnn-24x768", 64, true, 0}, {"char-gpt", 1, false, 0},
    {"mamba-small", 1, false, 0},    {"mamba2-small", 1, false, 0},
};
constexpr int64_t kPrompt = 64, kNew = 256;

std::string decode_name(const DecodeRow& r) { return fmt::format("{} B{} prompt {} new {}{}", r.base, r.batch, kPrompt, kNew, r.states == DType::f32 ? "" : " bf16 states"); }

Row measure_decode(const DecodeRow& r, Device device) {
  Row row;
  row.name = decode_name(r);
  row.goal_ms = r.goal_ms;
  const BenchModel shape{row.name, r.base, r.batch, kPrompt + kNew, r.cuda};
  const Config config = bench_config(shape, device);
  Session session = bench_session(config);
  layers::LanguageModel& model = session.language_model("decoding");
  model.set_training(false);
  const Tensor prompts = random_batch(config, 0).tokens.slice(1, 0, kPrompt).contiguous();
  const auto loop = [&](int64_t n, bool graphs) {
    auto l = std::make_unique<DecodeLoop>(model, session.parameters->options(), r.batch, kPrompt + kNew, n,
                                          kernels::SampleOptions{.temperature = 0}, graphs, r.states);
    l->prefill(prompts);
    return l;
  };

  Allocator& memory = allocator(device);
  memory.reset_peak();
  const auto measured = loop(kNew, true);
  constexpr int64_t kLap = 16;  // steps between two marks: one of them puts what is recent into the states
  for (int64_t i = 0; i < 7; ++i) measured->step();
  const int64_t laps = (kNew - 8) / kLap;
  DeviceTimer timer(device, laps);
  for (int64_t lap = 0; lap < laps; ++lap) {
    timer.begin(lap);
    for (int64_t i = 0; i < kLap; ++i) measured->step();
    timer.end(lap);
  }
  std::vector<double> ms = timer.milliseconds();
  for (double& t : ms) t /= static_cast<double>(kLap);
  row.time = summarize(ms);
  row.time.method = fmt::format("{} around {} steps, {}", device.is_cpu() ? "clock" : "events", kLap,
                                measured->captured() ? "one captured graph a step" : "plain launches");
  row.values["tokens_per_s"] = 1e3 * static_cast<double>(r.batch) / row.time.median_ms;
  row.values["peak_bytes"] = static_cast<double>(memory.stats().peak_bytes);
  // Every weight read once; constant states read and written.
  row.work.bytes = static_cast<double>(session.parameters->parameter_count() * size_of(session.parameters->options().compute));
  for (const layers::LayerState& layer : measured->state().layers)
    for (const auto& [name, value] : layer.tensors) {
      double times = name == "k" || name == "v" ? 0.6 : 2.0;  // caches: 0.2 to 1 full
      if (layer.tensors.contains("recent_count")) times = name == "ssm" || name == "c" ? 17.0 / 16 : name.starts_with("recent") ? 0.5 : times;
      row.work.bytes += times * static_cast<double>(value.nbytes());
    }

  // The same tokens from plain launches: what the graph froze must not show.
  constexpr int64_t kCompared = 24;
  const auto plain = loop(kCompared, false);
  while (plain->count() < kCompared) plain->step();
  const std::vector<int64_t> a = measured->drawn().slice(1, 0, kCompared).contiguous().to_vector<int64_t>();
  const std::vector<int64_t> b = plain->drawn().to_vector<int64_t>();
  int64_t differ = 0;
  for (size_t i = 0; i < a.size(); ++i) differ += a[i] != b[i];
  row.check = {fmt::format("{} tokens without a graph", kCompared), static_cast<double>(differ), 0, differ == 0};
  return row;
}

}  // namespace

int bench_decode(const BenchCommand& command) {
  const Device device = bench_device(command);
  std::vector<std::string> names;
  std::vector<const DecodeRow*> rows;
  for (const DecodeRow& r : kRows)
    if (r.cuda != device.is_cpu()) {
      names.push_back(decode_name(r));
      rows.push_back(&r);
    }
  const std::vector<size_t> chosen = select_rows(names, command);
  if (command.list) return 0;
  Output out(command, "decode", device);
  out.measure_ceilings();
  for (const size_t i : chosen) {
    Row row;
    try {
      row = measure_decode(*rows[i], device);
    } catch (const Error& e) {
      row.name = names[i];
      row.problem = e.what();
    }
    out.add(row);
    allocator(device).release_cached();
  }
  return out.finish();
}

}  // namespace krait::train::bench
