#pragma once
#include <string>
#include <utility>
#include <vector>

namespace krait::train {

/// One line of a plot. With `low` and `high` of the same length, the band between them is shaded.
struct PlotLine {
  std::string name;
  std::vector<double> x, y, low, high;
};

/// A line plot as one SVG element, with axes, grid and legend; no scripts, no other files. Points that are not finite
/// are left out.
std::string svg_plot(const std::vector<PlotLine>& lines, const std::string& x_name, const std::string& y_name);

/// Text made safe inside HTML and SVG.
std::string html_escape(const std::string& text);

}  // namespace krait::train
