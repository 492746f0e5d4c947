#include "torch/device_rows.h"

#ifdef PYCOMM_WITH_CUDA
#include "cuda/moe.h"
#include "torch/on_device.h"
#endif

namespace pycomm::torch_layer {

#ifdef PYCOMM_WITH_CUDA

void device_copy_rows(const View& out, const std::vector<View>& sources, const View& source,
                      const View& rows, const std::optional<View>& to) {
  const char* what = "copy_rows";
  std::vector<const View*> all = pointers(sources);
  all.insert(all.end(), {&source, &rows});
  if (to) all.push_back(&*to);
  const OnDevice on(what, out, all);
  const auto row_nbytes = static_cast<int64_t>(out.rows == 0 ? 0 : out.nbytes() / out.rows);
  // A copy of the bits, whatever they mean.
  const DType unit = row_nbytes % 4 == 0 ? DType::float32 : DType::float16;
  const auto size = static_cast<int64_t>(size_of(unit));
  if (row_nbytes % size != 0)
    refuse(what, "a row of " + std::to_string(row_nbytes) +
                     " bytes; on a device a row's bytes must be an even number");
  require(what, cuda::expand_rows(out.data, data_of(sources), ints(what, source), ints(what, rows),
                                  to ? ints(what, *to) : nullptr, static_cast<int64_t>(rows.numel),
                                  row_nbytes / size, unit, on.stream));
}

void device_combine_rows(const View& out, const std::vector<View>& sources, const View& source,
                         const View& rows, const View& offsets,
                         const std::optional<View>& weights) {
  const char* what = "combine_rows";
  std::vector<const View*> all = pointers(sources);
  all.insert(all.end(), {&source, &rows, &offsets});
  if (weights) all.push_back(&*weights);
  const OnDevice on(what, out, all);
  require(what, cuda::combine_rows(out.data, out.dtype, data_of(sources), sources.front().dtype,
                                   ints(what, source), ints(what, rows), ints(what, offsets),
                                   weights ? static_cast<const float*>(weights->data) : nullptr,
                                   static_cast<int64_t>(out.rows), static_cast<int64_t>(out.row()),
                                   on.stream));
}

void device_count_slots(const View& positions, const View& counts, const View& offsets,
                        const View& bins) {
  const char* what = "count_slots";
  const OnDevice on(what, positions, {&counts, &offsets, &bins});
  const auto written = [](const View& view) { return static_cast<int64_t*>(view.data); };
  require(what, cuda::count_slots(written(positions), written(counts), written(offsets),
                                  ints(what, bins), static_cast<int64_t>(bins.numel),
                                  static_cast<int64_t>(counts.numel), on.stream));
}

void device_row_dots(const View& out, const View& a, const std::optional<View>& a_rows,
                     const View& b, const std::optional<View>& b_rows, uint64_t width) {
  const char* what = "row_dots";
  std::vector<const View*> all = {&a, &b};
  for (const auto* each : {&a_rows, &b_rows})
    if (*each) all.push_back(&**each);
  const OnDevice on(what, out, all);
  const auto rows = [&](const std::optional<View>& of) { return of ? ints(what, *of) : nullptr; };
  require(what, cuda::row_dots(static_cast<float*>(out.data), a.data, rows(a_rows), b.data,
                               rows(b_rows), static_cast<int64_t>(out.numel),
                               static_cast<int64_t>(width), a.dtype, on.stream));
}

void device_code_rows(const View& coded, const View& values, uint64_t width, Wire wire,
                      bool encodes) {
  const char* what = encodes ? "encode_rows" : "decode_rows";
  if (wire != Wire::fp8) refuse(what, "on a device rows are coded in fp8 alone");
  const OnDevice on(what, coded, {&values});
  const auto n = static_cast<int64_t>(values.rows);
  if (encodes) {
    void* const buffer[] = {coded.data};
    require(what, cuda::encode_rows(buffer, nullptr, nullptr, nullptr, values.data, n,
                                    static_cast<int64_t>(width), values.dtype, on.stream));
    return;
  }
  const at::Tensor every = at::arange(n, at::TensorOptions().dtype(at::kLong).device(coded.device));
  const void* const source[] = {coded.data};
  require(what,
          cuda::decode_rows(values.data, source, nullptr, every.const_data_ptr<int64_t>(), nullptr,
                            n, static_cast<int64_t>(width), values.dtype, on.stream));
}

#else

namespace {

[[noreturn]] void without_cuda(const char* what) {
  refuse(what,
         "tensors on a CUDA device: this pycomm was built without CUDA; build it where nvcc is "
         "found (docs/install.md)");
}

}  // namespace

void device_copy_rows(const View&, const std::vector<View>&, const View&, const View&,
                      const std::optional<View>&) {
  without_cuda("copy_rows");
}
void device_combine_rows(const View&, const std::vector<View>&, const View&, const View&,
                         const View&, const std::optional<View>&) {
  without_cuda("combine_rows");
}
void device_count_slots(const View&, const View&, const View&, const View&) {
  without_cuda("count_slots");
}
void device_row_dots(const View&, const View&, const std::optional<View>&, const View&,
                     const std::optional<View>&, uint64_t) {
  without_cuda("row_dots");
}
void device_code_rows(const View&, const View&, uint64_t, Wire, bool encodes) {
  without_cuda(encodes ? "encode_rows" : "decode_rows");
}

#endif

}  // namespace pycomm::torch_layer
