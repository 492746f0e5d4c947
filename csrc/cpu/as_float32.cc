#include "cpu/as_float32.h"

#include "cpu/reduce.h"

namespace pycomm::cpu {

void put_on_float32(Launch& launch) {
  const DType narrow = launch.fingerprint.dtype;
  const size_t n_in = launch.input_nbytes / sizeof(float),
               n_out = launch.output_nbytes / sizeof(float);
  const auto wide_in = std::make_shared_for_overwrite<float[]>(n_in);
  to_float32(wide_in.get(), launch.input, n_in, narrow);
  const auto wide_out = launch.output == nullptr ? nullptr
                        : launch.output == launch.input
                            ? wide_in
                            : std::make_shared_for_overwrite<float[]>(n_out);
  launch.finish = [wide_in, wide_out, n_out, narrow, output = launch.output,
                   finish = std::move(launch.finish)] {
    if (output != nullptr) from_float32(output, wide_out.get(), n_out, narrow);
    if (finish) finish();
  };
  launch.input = wide_in.get();
  launch.output = wide_out.get();
}

}  // namespace pycomm::cpu
