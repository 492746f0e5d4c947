// Sends and receives of a CudaEngine that come alone: over a communicator of their two ranks.
#include "cuda/work.h"

namespace pycomm::cuda {

std::shared_ptr<Work> CudaEngine::start_message(const Message& message,
                                                std::shared_ptr<void> keep_alive) {
  const std::lock_guard lock(mutex_);
  require_sound();
  auto operation = std::make_shared<Operation>();
  operation->what = (message.is_send ? "send to " : "recv from ") + who(message.peer) + " (" +
                    std::to_string(message.nbytes) + " bytes, message #" +
                    std::to_string(n_messages_++) + ")";
  operation->peer = message.peer;
  operation->deadline = message.deadline;
  operation->memory = std::move(keep_alive);
  Pair& with = pair(message.peer, message.deadline);
  if (with.courier && device_.capturing(message.stream))
    throw Error(Code::invalid_argument, me_ + ": " + operation->what +
                                            " goes through the host, which no graph can capture");
  const int peer = message.peer < rank_ ? 0 : 1;
  submit(operation, false, with.stream, message.stream,
         [&] {
           if (with.courier)
             return carry({message}, operation->what, with.host, *with.courier, with.stream);
           with.communicator->run(
               operation->what, look_for_word_now_and_then(), operation->deadline,
               [&](NcclComm* comm) {
                 const auto& api = *options_.api;
                 return message.is_send ? api.send(message.data, message.nbytes, NcclDType::uint8,
                                                   peer, comm, with.stream)
                                        : api.recv(message.data, message.nbytes, NcclDType::uint8,
                                                   peer, comm, with.stream);
               });
         },
         {});
  return std::make_shared<CudaWork>(shared_from_this(), operation);
}

std::shared_ptr<Work> CudaEngine::send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                                       Clock::time_point deadline,
                                       std::shared_ptr<void> keep_alive) {
  if (tag != 0)
    throw Error(Code::invalid_argument, me_ + ": send: tag " + std::to_string(tag) +
                                            ": NCCL's messages have no tag, they come in order");
  return start_message({true, const_cast<void*>(data), nbytes, peer, nullptr, deadline, true},
                       std::move(keep_alive));
}

std::shared_ptr<Work> CudaEngine::recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                                       Clock::time_point deadline,
                                       std::shared_ptr<void> keep_alive) {
  if (tag != 0)
    throw Error(Code::invalid_argument, me_ + ": recv: tag " + std::to_string(tag) +
                                            ": NCCL's messages have no tag, they come in order");
  if (peer < 0)
    throw Error(Code::invalid_argument,
                me_ + ": recv from any rank: NCCL must know who sends; name the source");
  return start_message({false, data, nbytes, peer, nullptr, deadline, true}, std::move(keep_alive));
}

void CudaEngine::run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                          Clock::time_point deadline) {
  send(data, nbytes, peer, tag, deadline, nullptr)->wait(kForever);
}

int CudaEngine::run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                         Clock::time_point deadline) {
  recv(data, nbytes, peer, tag, deadline, nullptr)->wait(kForever);
  return peer;
}

}  // namespace pycomm::cuda
