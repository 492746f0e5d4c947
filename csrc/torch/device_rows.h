// Rows by index on tensors of a CUDA device (cuda/moe.h), on torch's current stream there; rows.cc
// has them for CPU tensors and sends those of a device here. Indices are not read on the host, so
// that nothing waits for the device: what made the tables checked them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/wire.h"
#include "torch/arrays.h"

namespace pycomm::torch_layer {

// All on one device; throws Error(invalid_argument) with the name of what is not.
void device_copy_rows(const View& out, const std::vector<View>& sources, const View& source,
                      const View& rows, const std::optional<View>& to);
void device_combine_rows(const View& out, const std::vector<View>& sources, const View& source,
                         const View& rows, const View& offsets, const std::optional<View>& weights);
// The first three are written.
void device_count_slots(const View& positions, const View& counts, const View& offsets,
                        const View& bins);
// rows: none, or one for each product. a and b are of one type, with rows of width values.
void device_row_dots(const View& out, const View& a, const std::optional<View>& a_rows,
                     const View& b, const std::optional<View>& b_rows, uint64_t width);
// One of the two is written. n rows of width values; e4m3 alone.
void device_code_rows(const View& coded, const View& values, uint64_t width, Wire wire,
                      bool encodes);

}  // namespace pycomm::torch_layer
