#include "train/svg_plot.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace krait::train {

namespace {

constexpr double kWidth = 860, kHeight = 420, kLeft = 70, kRight = 250, kTop = 15, kBottom = 45;
// Colours that stay apart for colour-blind readers (Okabe & Ito 2008), then repeated with other dashes.
constexpr std::array<const char*, 7> kColours{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"};
constexpr std::array<const char*, 3> kDashes{"", "6 3", "2 3"};

struct Span {
  double low = INFINITY, high = -INFINITY;
  void take(double v) {
    if (!std::isfinite(v)) return;
    low = std::min(low, v);
    high = std::max(high, v);
  }
  void widen() {
    if (low > high) low = 0, high = 1;
    if (low == high) low -= 0.5, high += 0.5;
  }
};

// 1, 2 or 5 times a power of ten, so that about `count` marks fit.
double mark_step(const Span& s, int count) {
  const double rough = (s.high - s.low) / count, power = std::pow(10.0, std::floor(std::log10(rough)));
  const double part = rough / power;
  return power * (part < 1.5 ? 1 : part < 3.5 ? 2 : part < 7.5 ? 5 : 10);
}

}  // namespace

std::string html_escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string svg_plot(const std::vector<PlotLine>& lines, const std::string& x_name, const std::string& y_name) {
  Span xs, ys;
  for (const PlotLine& line : lines) {
    for (const double v : line.x) xs.take(v);
    for (const auto* values : {&line.y, &line.low, &line.high})
      for (const double v : *values) ys.take(v);
  }
  xs.widen();
  ys.widen();
  const auto px = [&](double x) { return kLeft + (x - xs.low) / (xs.high - xs.low) * (kWidth - kLeft - kRight); };
  const auto py = [&](double y) { return kHeight - kBottom - (y - ys.low) / (ys.high - ys.low) * (kHeight - kTop - kBottom); };
  std::string svg = fmt::format("<svg viewBox=\"0 0 {} {}\" width=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n",
                                kWidth, kHeight, kWidth);
  const auto text = [&](double x, double y, const char* anchor, const std::string& s) {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" fill=\"#333\">{}</text>\n", x, y, anchor, html_escape(s));
  };
  const auto rule = [&](double x1, double y1, double x2, double y2) {
    svg += fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#ddd\"/>\n", x1, y1, x2, y2);
  };
  const double x_step = mark_step(xs, 6), y_step = mark_step(ys, 6);
  for (double v = std::ceil(xs.low / x_step) * x_step; v <= xs.high + x_step * 1e-9; v += x_step) {
    rule(px(v), kTop, px(v), kHeight - kBottom);
    text(px(v), kHeight - kBottom + 16, "middle", fmt::format("{:.6g}", v));
  }
  for (double v = std::ceil(ys.low / y_step) * y_step; v <= ys.high + y_step * 1e-9; v += y_step) {
    rule(kLeft, py(v), kWidth - kRight, py(v));
    text(kLeft - 6, py(v) + 4, "end", fmt::format("{:.4g}", std::abs(v) < y_step * 1e-6 ? 0.0 : v));
  }
  text((kLeft + kWidth - kRight) / 2, kHeight - 8, "middle", x_name);
  text(kLeft - 6, kTop - 3, "start", y_name);

  for (size_t i = 0; i < lines.size(); ++i) {
    const PlotLine& line = lines[i];
    const char* colour = kColours[i % kColours.size()];
    const char* dash = kDashes[i / kColours.size() % kDashes.size()];
    std::string path, band, back;
    for (size_t k = 0; k < line.x.size(); ++k) {
      if (!std::isfinite(line.y[k])) continue;
      path += fmt::format("{:.1f},{:.1f} ", px(line.x[k]), py(line.y[k]));
      if (line.low.empty()) continue;
      band += fmt::format("{:.1f},{:.1f} ", px(line.x[k]), py(line.high[k]));
      back = fmt::format("{:.1f},{:.1f} ", px(line.x[k]), py(line.low[k])) + back;
    }
    if (!band.empty())
      svg += fmt::format("<polygon points=\"{}{}\" fill=\"{}\" opacity=\"0.15\"/>\n", band, back, colour);
    svg += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" stroke-dasharray=\"{}\"/>\n",
                       path, colour, dash);
    const double y = kTop + 12 + 18 * static_cast<double>(i), x = kWidth - kRight + 12;
    svg += fmt::format("<line x1=\"{0}\" y1=\"{1}\" x2=\"{2}\" y2=\"{1}\" stroke=\"{3}\" stroke-width=\"2\" stroke-dasharray=\"{4}\"/>\n",
                       x, y - 4, x + 24, colour, dash);
    text(x + 30, y, "start", line.name);
  }
  return svg + "</svg>\n";
}

}  // namespace krait::train
