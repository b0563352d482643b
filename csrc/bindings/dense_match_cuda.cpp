#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/dense_match_checks.hpp"
#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

void expect(const py::tuple& t, std::size_t size, const char* form) {
  if (t.size() != size) {
    throw py::value_error(std::string("dense_match: expected ") + form + ", got a tuple of " +
                          std::to_string(t.size()));
  }
}

MatchAxis axis(const py::tuple& t) {
  expect(t, 8, "an axis (cells, pixels, strips, low, high, first, weight, longest)");
  return {t[0].cast<std::int64_t>(),         t[1].cast<std::int64_t>(),         t[2].cast<std::int64_t>(),
          pointer<const std::int32_t>(t[3]), pointer<const std::int32_t>(t[4]), pointer<const std::int32_t>(t[5]),
          pointer<const float>(t[6]),        t[7].cast<std::int64_t>()};
}

MatchImage image(const py::tuple& y, const py::tuple& x, const py::tuple& scale) {
  expect(scale, 5, "scales (pixel, high, low, rows, spans)");
  return {axis(y),
          axis(x),
          pointer<const float>(scale[0]),
          pointer<const float>(scale[1]),
          pointer<const float>(scale[2]),
          pointer<const float>(scale[3]),
          pointer<const float>(scale[4])};
}

MatchWhen when_of(const py::tuple& t) {
  expect(t, 2, "a condition (flag, wanted)");
  return {pointer<const std::int32_t>(t[0]), t[1].cast<bool>()};
}

template <class Call>
void launch(void (*run)(const Call&, int, void*), const Call& call, int device, std::uintptr_t stream) {
  if (device < 0) throw py::value_error("dense_match: device " + std::to_string(device) + " does not exist");
  py::gil_scoped_release release;
  run(call, device, pointer<void>(stream));
}

#if !LIFT_FAST_CUDA
template <class Call>
void missing(const Call&, int, void*) {
  throw std::runtime_error("dense_match: built without CUDA: " LIFT_FAST_CUDA_REASON);
}
constexpr auto match_spans = &missing<MatchSpansCall>;
constexpr auto match_groups = &missing<GroupMatchCall>;
constexpr auto match_points = &missing<PointMatchCall>;
constexpr auto match_mutual = &missing<MutualMatchCall>;
#else
constexpr auto match_spans = &match_spans_run;
constexpr auto match_groups = &match_groups_run;
constexpr auto match_points = &match_points_run;
constexpr auto match_mutual = &match_mutual_run;
#endif

void spans(std::uintptr_t gram, const py::tuple& y, const py::tuple& x, std::uintptr_t scale_high, std::uintptr_t out,
           int device, std::uintptr_t stream) {
  MatchSpansCall call{};
  call.gram = pointer<const double>(gram);
  call.y = axis(y);
  call.x = axis(x);
  call.scale_high = pointer<const float>(scale_high);
  call.spans = pointer<float>(out);
  check_spans(call);
  launch(match_spans, call, device, stream);
}

void groups(std::uintptr_t table, std::int64_t rows, const py::tuple& key_y, const py::tuple& key_x,
            const py::tuple& key_scale, const py::tuple& query_y, const py::tuple& query_x, const py::tuple& band,
            std::uintptr_t similarity, std::uintptr_t index, const py::tuple& when, int device, std::uintptr_t stream) {
  GroupMatchCall call{};
  call.table = pointer<const float>(table);
  call.rows = rows;
  call.key = image(key_y, key_x, key_scale);
  call.query_y = axis(query_y);
  call.query_x = axis(query_x);
  expect(band, 7, "a band (first y, end y, first x, end x, top, left, width)");
  std::int64_t* const parts[7] = {&call.band.first_y, &call.band.end_y, &call.band.first_x, &call.band.end_x,
                                  &call.band.top,     &call.band.left,  &call.band.width};
  for (std::size_t i = 0; i < 7; ++i) *parts[i] = band[i].cast<std::int64_t>();
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.when = when_of(when);
  check_groups(call);
  launch(match_groups, call, device, stream);
}

void points(std::uintptr_t table, std::int64_t count, const py::tuple& key_y, const py::tuple& key_x,
            const py::tuple& key_scale, std::uintptr_t similarity, std::uintptr_t index, const py::tuple& when,
            int device, std::uintptr_t stream) {
  PointMatchCall call{};
  call.table = pointer<const float>(table);
  call.points = count;
  call.key = image(key_y, key_x, key_scale);
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.when = when_of(when);
  check_points(call);
  launch(match_points, call, device, stream);
}

void mutual(std::uintptr_t table, const py::tuple& query_y, const py::tuple& query_x, const py::tuple& query_scale,
            const py::tuple& key_y, const py::tuple& key_x, std::uintptr_t index, std::uintptr_t valid,
            std::uintptr_t scratch, std::int64_t scratch_words, const py::tuple& when, int device,
            std::uintptr_t stream) {
  MutualMatchCall call{};
  call.table = pointer<const float>(table);
  call.query = image(query_y, query_x, query_scale);
  call.key_y = axis(key_y);
  call.key_x = axis(key_x);
  call.index = pointer<const std::int64_t>(index);
  call.valid = pointer<bool>(valid);
  call.scratch = pointer<std::int32_t>(scratch);
  call.scratch_words = scratch_words;
  call.when = when_of(when);
  check_mutual(call);
  launch(match_mutual, call, device, stream);
}

}  // namespace

void bind_dense_match_cuda(py::module_& m) {
  m.def("dense_match_spans", &spans, py::arg("gram"), py::arg("key_y"), py::arg("key_x"), py::arg("scale_high"),
        py::arg("spans"), py::arg("device"), py::arg("stream"),
        "On a CUDA device, what bounds the cosines in each patch of an image, for the functions below: writes spans "
        "[y strips, x strips, 16] float32, aligned to 16 bytes. gram [5, h, w] float64: products of each cell with "
        "itself and its neighbours to the right, below, below to the right and below to the left, at the border with "
        "the cell there. scale_high [y strips, x strips] float32, the largest factor in each patch.");
  m.def(
      "dense_match_groups", &groups, py::arg("table"), py::arg("rows"), py::arg("key_y"), py::arg("key_x"),
      py::arg("key_scale"), py::arg("query_y"), py::arg("query_x"), py::arg("band"), py::arg("similarity"),
      py::arg("index"), py::arg("when"), py::arg("device"), py::arg("stream"),
      "On a CUDA device, for each query pixel of a band the key pixel of the largest bilinearly interpolated "
      "similarity, the lowest row-major one among equals. Addresses of contiguous arrays on the device: table [rows, "
      "key cells] float32, similarities of the band's query cells; similarity float32 and index int64, both of every "
      "query pixel, -inf and -1 where every value is NaN or infinite. An axis is (cells, pixels, strips, low, high, "
      "first, weight, longest): int32 low and high [strips], first [strips + 1], float32 weight [pixels]; these "
      "arrays are not checked. key_scale is (pixel, high, low, rows, spans), float32 factors of the key's pixels, their "
      "range in each patch, the largest of each of its rows and what dense_match_spans wrote, or zeros. band is (first y, end y, first x, end x, top, left, "
      "width): query strips, and the table's first cell and row length. when is (flag, wanted), flag the address of an "
      "int32 on the device: the launch works only if (*flag != 0) == wanted; (0, True) means always. Launches on `stream` "
      "and returns.");
  m.def("dense_match_points", &points, py::arg("table"), py::arg("points"), py::arg("key_y"), py::arg("key_x"),
        py::arg("key_scale"), py::arg("similarity"), py::arg("index"), py::arg("when"), py::arg("device"),
        py::arg("stream"), "The same for single points, each with its own row of table [points, key cells].");
  m.def(
      "dense_match_mutual", &mutual, py::arg("table"), py::arg("query_y"), py::arg("query_x"), py::arg("query_scale"),
      py::arg("key_y"), py::arg("key_x"), py::arg("index"), py::arg("valid"), py::arg("scratch"),
      py::arg("scratch_words"), py::arg("when"), py::arg("device"), py::arg("stream"),
      "Whether each query pixel is the best one of its match: table [query cells, key cells] float32, index [query "
      "pixels] int64 as dense_match_groups writes it; writes valid [query pixels] bool. scratch: int32 zeros, 8 for each "
      "query pixel (without scales for four in each patch), and 8 more.");
  m.attr("most_mutual_group") = kMostMutualGroup;
  m.attr("most_mutual_cells") = kMostMutualCells;
}

}  // namespace lift_fast
