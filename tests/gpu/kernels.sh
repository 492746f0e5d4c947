#!/bin/bash
# kernels.sh BUILD CUDA_HOME: the C++ tests on this machine's first GPU, then the kernels under compute-sanitizer, which
# is looked for in the toolkit and on PATH. Says last what could not be run here, and writes it to BUILD/not_run; that is
# not called passed, and no failure.
set -uo pipefail
build=$1
sanitizer=$2/bin/compute-sanitizer
test -x "$sanitizer" || sanitizer=$(command -v compute-sanitizer)
export CUDA_DEVICE_MAX_CONNECTIONS=32
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0

run() {
  echo "== $*"
  timeout 300 "$@" 2>&1 | tee -a "$log"
  local ended=${PIPESTATUS[0]}
  test "$ended" = 0 || { echo "FAILED ($ended): $*" | tee -a "$log"; status=1; }
}

run "$build/gpu_kernels"
run "$build/gpu_moe"
run "$build/gpu_threads"
if test -n "$sanitizer"; then
  export PYCOMM_TEST_SMALL=1 PYCOMM_TEST_DEADLINE_S=250
  for program in gpu_kernels gpu_moe; do
    run "$sanitizer" --error-exitcode 1 --tool memcheck "$build/$program"
  done
  run "$sanitizer" --error-exitcode 1 --tool memcheck "$build/gpu_threads" all_reduce_of_peers_on_one_device
  run "$sanitizer" --error-exitcode 1 --tool racecheck "$build/gpu_kernels" quantise
else
  echo "NOT RUN: compute-sanitizer is not installed" >>"$log"
fi
echo "== the C++ tests on a GPU"
grep -E "^NOT RUN" "$log" >"$build/not_run"
grep -E "NOT RUN|FAILED" "$log" || echo "all ran and passed"
exit $status
