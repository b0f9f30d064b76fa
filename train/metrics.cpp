#include "train/metrics.h"

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "train/build_info.h"

namespace krait::train {
namespace {

/// Writes one JSON object on one line, in the order of the calls.
class LineWriter {
 public:
  LineWriter& add(const char* key, int64_t value) { return raw(key, fmt::format("{}", value)); }
  LineWriter& add(const char* key, double value) {
    return raw(key, std::isfinite(value) ? fmt::format("{}", value) : "null");
  }
  LineWriter& add(const char* key, const std::optional<double>& value) {
    return value ? add(key, *value) : raw(key, "null");
  }
  LineWriter& add(const char* key, const std::string& value) { return raw(key, nlohmann::json(value).dump()); }
  std::string str() const { return text_ + "}"; }

 private:
  LineWriter& raw(const char* key, const std::string& value) {
    text_ += fmt::format("{}\"{}\":{}", text_.size() > 1 ? "," : "", key, value);
    return *this;
  }
  std::string text_ = "{";
};

nlohmann::ordered_json eval_json(const std::optional<EvalMetrics>& m) {
  return m ? nlohmann::ordered_json::parse(to_json(*m)) : nlohmann::ordered_json();
}

nlohmann::ordered_json optional_json(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

}  // namespace

double StepMetrics::ppl() const { return std::exp(loss); }
double EvalMetrics::ppl() const { return std::exp(nll); }

bool is_better(const EvalMetrics& a, const EvalMetrics& b) {
  if (a.accuracy && b.accuracy && *a.accuracy != *b.accuracy) return *a.accuracy > *b.accuracy;
  return a.nll < b.nll;
}

std::string human_ppl(double ppl, int digits) { return ppl < 1e6 ? fmt::format("{:.{}f}", ppl, digits) : fmt::format("{:.4g}", ppl); }

std::string describe(const EvalMetrics& m) {
  if (m.rmse) return fmt::format("rmse {:.6g}", *m.rmse);
  std::string text = fmt::format("nll {:.4f}", m.nll);
  text += m.accuracy ? fmt::format("  accuracy {:.2f} %", 100 * *m.accuracy) : fmt::format("  ppl {}", human_ppl(m.ppl()));
  return m.bpb ? text + fmt::format("  bits/byte {:.4f}", *m.bpb) : text;
}

std::string to_json(const StepMetrics& m) {
  LineWriter line;
  line.add("step", m.step).add("tokens", m.tokens).add("loss", m.loss);
  if (m.aux_loss) line.add("aux_loss", *m.aux_loss);
  return line.add("ppl", m.ppl())
      .add("lr", m.lr)
      .add("grad_norm", m.grad_norm)
      .add("tokens_per_s", m.tokens_per_s)
      .add("mfu", m.mfu)
      .add("mem_bytes", m.mem_bytes)
      .add("time_s", m.time_s)
      .str();
}

std::string to_json(const EvalMetrics& m) {
  LineWriter line;
  line.add("step", m.step).add("tokens", m.tokens).add("split", m.split).add("nll", m.nll);
  if (!m.rmse) line.add("ppl", m.ppl());
  if (m.bpb) line.add("bpb", m.bpb);
  if (m.accuracy) line.add("accuracy", m.accuracy);
  if (m.rmse) line.add("rmse", m.rmse);
  return line.add("time_s", m.time_s).str();
}

namespace {

/// Calls f(line with its newline, object) for each whole line that is the metrics of a step.
template <class F>
void for_each_line(const std::string& text, F f) {
  size_t begin = 0;
  for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string_view line(text.data() + begin, end - begin + 1);
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (json.is_object() && json.contains("step") && json["step"].is_number_integer()) f(line, json);
  }
}

std::optional<double> number(const nlohmann::json& line, const char* key) {
  const auto found = line.find(key);
  return found != line.end() && found->is_number() ? std::optional<double>(found->get<double>()) : std::nullopt;
}
double number_or_nan(const nlohmann::json& line, const char* key) {
  return number(line, key).value_or(std::numeric_limits<double>::quiet_NaN());
}
int64_t integer(const nlohmann::json& line, const char* key) {
  const auto found = line.find(key);
  return found != line.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
}

}  // namespace

LoggedStep read_logged(const std::string& path, int64_t step, const std::string& split) {
  LoggedStep logged;
  if (!std::filesystem::exists(path)) return logged;
  for_each_line(read_file(path), [&](std::string_view, const nlohmann::json& line) {
    if (line["step"].get<int64_t>() != step) return;
    if (line.contains("loss")) {
      StepMetrics& m = logged.training.emplace();
      m.step = step;
      m.tokens = integer(line, "tokens");
      m.loss = number_or_nan(line, "loss");
      m.aux_loss = number(line, "aux_loss");
      m.lr = number_or_nan(line, "lr");
      m.grad_norm = number_or_nan(line, "grad_norm");
      m.tokens_per_s = number_or_nan(line, "tokens_per_s");
      m.mfu = number(line, "mfu");
      m.mem_bytes = integer(line, "mem_bytes");
      m.time_s = number_or_nan(line, "time_s");
    } else if (const auto name = line.find("split"); name != line.end() && name->is_string() && name->get<std::string>() == split) {
      EvalMetrics& m = logged.evaluation.emplace();
      m.step = step;
      m.tokens = integer(line, "tokens");
      m.split = split;
      m.nll = number_or_nan(line, "nll");
      m.bpb = number(line, "bpb");
      m.accuracy = number(line, "accuracy");
      m.rmse = number(line, "rmse");
      m.time_s = number_or_nan(line, "time_s");
    }
  });
  return logged;
}

MetricsLog::MetricsLog(const std::string& path, int64_t last_step) {
  std::string kept;
  if (last_step >= 0 && std::filesystem::exists(path)) {
    for_each_line(read_file(path), [&](std::string_view line, const nlohmann::json& json) {
      if (json["step"].get<int64_t>() <= last_step) kept += line;
    });
  }
  write_file_atomic(path, kept);
  file_ = AppendFile(path);
}

std::string to_json(const Summary& s) {
  nlohmann::ordered_json json;
  json["name"] = s.name;
  json["status"] = s.status;
  json["steps"] = s.steps;
  json["tokens"] = s.tokens;
  json["final_loss"] = s.final_loss;
  json["final_eval"] = eval_json(s.final_eval);
  json["best_eval"] = eval_json(s.best_eval);
  json["parameters"] = s.parameters;
  json["wall_time_s"] = s.wall_time_s;
  json["tokens_per_s"] = s.tokens_per_s;
  json["mfu"] = optional_json(s.mfu);
  json["peak_mem_bytes"] = s.peak_mem_bytes;
  json["device"] = s.device;
  json["hardware"] = s.hardware;
  json["precision"] = s.precision;
  json["threads"] = s.threads;
  json["krait_version"] = kVersion;
  json["git_revision"] = git_revision();
  return json.dump(2) + "\n";
}

bool is_summary_of(const std::string& path, int64_t step) {
  if (!std::filesystem::exists(path)) return false;
  const auto json = nlohmann::json::parse(read_file(path), nullptr, false);
  return json.is_object() && json.value("status", nlohmann::json()) == "finished" && json.value("steps", nlohmann::json()) == step;
}

}  // namespace krait::train
