// A library with NCCL's names, to test how it is opened. FAKE_VERSION is what it says it is;
// FAKE_WITHOUT_SPLIT leaves a required function out; FAKE_WITHOUT_NEWER leaves out what came
// after 2.18.
#define FAKE(name) \
  int name() { return 0; }

extern "C" {
int ncclGetVersion(int* version) {
  *version = FAKE_VERSION;
  return 0;
}
const char* ncclGetErrorString(int result) {
  return result ? "unhandled system error" : "no error";
}
const char* ncclGetLastError(void*) { return "connection refused by peer 3"; }
int ncclAllReduce(const void* in, void* out, unsigned long count, int dtype, int op, void* comm,
                  void* stream) {
  // Enough to see that the arguments arrive in order: one float32 sum over a "group" of two equal
  // ranks.
  if (dtype != 7 || op != 0 || comm || stream) return 4;
  for (unsigned long i = 0; i < count; ++i)
    static_cast<float*>(out)[i] = 2 * static_cast<const float*>(in)[i];
  return 0;
}
FAKE(ncclGetUniqueId)
FAKE(ncclCommInitRankConfig)
FAKE(ncclCommGetAsyncError)
FAKE(ncclCommFinalize)
FAKE(ncclCommDestroy)
FAKE(ncclCommAbort)
FAKE(ncclGroupStart)
FAKE(ncclGroupEnd)
FAKE(ncclReduce)
FAKE(ncclBroadcast)
FAKE(ncclAllGather)
FAKE(ncclReduceScatter)
FAKE(ncclSend)
FAKE(ncclRecv)
#ifndef FAKE_WITHOUT_SPLIT
FAKE(ncclCommSplit)
#endif
#ifndef FAKE_WITHOUT_NEWER
FAKE(ncclCommRegister)
FAKE(ncclCommWindowRegister)
FAKE(ncclCommShrink)
FAKE(ncclAlltoAll)
#endif
}
