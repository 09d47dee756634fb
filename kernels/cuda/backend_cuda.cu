// The CUDA backend: one device, one stream, the op table.
#include <algorithm>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/late_spans.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/op_timer.h"
#include "kernels/cuda/ops_cuda.h"
#include "kernels/cuda/roofline.h"

namespace longspan {
namespace {

constexpr int kOldestCapability = 80;            // the first with bf16 tensor cores
constexpr size_t kMostGraphs = 512;              // some 100 KiB of memory each
constexpr size_t kStageBytes = size_t{8} << 20;  // pinned, each way of each half

__global__ void Nothing() {}

OpTable CudaOps() {
  OpTable table;
#define LONGSPAN_CUDA_OP(name)                                                 \
  table.name.function = [](BackendContext& context, const name##Args& args) {  \
    auto& cuda_context = static_cast<cuda::BackendContext&>(context);          \
    cudaSetDevice(cuda_context.device); /* it belongs to the calling thread */ \
    if (cuda_context.replaying) return;                                        \
    if (cuda_context.fault.empty()) cuda::name(cuda_context, args);            \
  };
  LONGSPAN_OPS(LONGSPAN_CUDA_OP)
#undef LONGSPAN_CUDA_OP
  return table;
}

// Pinned memory that copies pass through, in two halves: one is filled while the other travels.
struct Stage {
  std::byte* memory = nullptr;
  cudaEvent_t sent[2] = {};  // the half's last copy has left
  int half = 0;
  size_t used = 0;  // of this half
};

// A copy that is waited for later, by way of pinned memory.
struct LaterCopy {
  std::byte* memory = nullptr;  // kStageBytes
  cudaEvent_t there = nullptr;
  void* to = nullptr;
  size_t bytes = 0;  // 0: none is under way
};

// Ops that were issued under one key. They are captured when they come for the second time: by then
// all that kernels and libraries load or set up at their first use is there.
struct Graph {
  bool seen = false;
  cudaGraphExec_t executable = nullptr;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(std::unique_ptr<cuda::BackendContext> context, Stage in, std::byte* out,
              LaterCopy later, std::string name)
      : Backend(std::move(name), context.get(), CudaOps(), /*host_memory=*/false),
        context_(std::move(context)),
        in_(in),
        out_(out),
        later_(later) {
    context_->late_spans = cuda::MakeLateSpans();
  }
  ~CudaBackend() override {
    Bind();
    cudaStreamSynchronize(context_->stream);
    timer_.reset();
    ForgetGraphs();
    cuda::FreeTilePlans(context_->tile_plans);
    cuda::FreeLateSpans(context_->late_spans);
    cublasLtDestroy(context_->cublas);
    cudaFree(context_->workspace);
    cudaFreeHost(in_.memory);
    cudaFreeHost(out_);
    cudaFreeHost(later_.memory);
    cudaEventDestroy(later_.there);
    for (cudaEvent_t event : in_.sent) cudaEventDestroy(event);
    cudaStreamDestroy(context_->stream);
  }

  DType ProductInput(const MatMulArgs& product) const override {
    return cuda::ProductInput(*context_, product);
  }

  void Repeat(uint64_t key, const std::function<void()>& issue) override {
    if (timing()) return issue();
    if (graphs_.size() >= kMostGraphs && graphs_.count(key) == 0) ForgetGraphs();
    Graph& graph = graphs_[key];
    if (!std::exchange(graph.seen, true) || !context_->fault.empty()) return issue();
    Bind();
    const bool captured = graph.executable != nullptr;
    if (!captured) Capture(issue, &graph.executable);
    if (context_->fault.empty()) {
      Check(cudaGraphLaunch(graph.executable, context_->stream), "launching a graph");
    }
    if (captured) {  // the device works meanwhile
      context_->replaying = true;
      issue();
      context_->replaying = false;
    }
  }

  Buffer Allocate(size_t bytes) override {
    if (bytes == 0) return Buffer();
    Bind();
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
      cudaGetLastError();  // out of memory is an answer, not a fault
      return Buffer();
    }
    Check(cudaMemsetAsync(data, 0, bytes, context_->stream), "clearing memory");
    return Buffer(data, bytes, [](void* p, size_t) { cudaFree(p); });
  }

  int64_t FreeBytes() const override {
    Bind();
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(free) : 0;
  }

  std::string Fault() const override { return context_->fault; }

  int64_t WeightBytes(const View& matrix) const override {
    return IsQuantised(matrix.dtype)
               ? cuda::StripBytes(matrix.dtype, matrix.shape[0], matrix.shape[1])
               : matrix.bytes();
  }

  View PlaceWeights(const View& matrix, std::byte* to) override {
    if (!IsQuantised(matrix.dtype)) return Backend::PlaceWeights(matrix, to);
    const int64_t rows = matrix.shape[0], row_bytes = BytesOf(matrix.dtype, matrix.shape[1]);
    const int64_t most = static_cast<int64_t>(cuda::BackendContext::kWorkspaceBytes) / row_bytes /
                         cuda::kStripRows * cuda::kStripRows;
    CHECK_GT(most, 0) << "rows of " << matrix.shape[1];
    View part = matrix;
    for (int64_t row = 0; row < rows && context_->fault.empty(); row += most) {
      part.shape[0] = std::min(most, rows - row);
      part.data = context_->Workspace(part.bytes());
      CopyIn(part.data, matrix.row(row), part.bytes());
      cuda::PackStrips(*context_, part, to + row * row_bytes);
    }
    View placed = matrix;
    placed.data = to;
    placed.packed = true;
    return placed;
  }

  Roofline MeasureRoofline() override {
    Bind();
    return cuda::MeasureRoofline(*context_);
  }

  void CopyIn(void* to, const void* from, size_t bytes) override {
    Bind();
    auto* target = static_cast<std::byte*>(to);
    auto* source = static_cast<const std::byte*>(from);
    while (bytes > 0 && context_->fault.empty()) {
      if (in_.used == kStageBytes) {
        Check(cudaEventRecord(in_.sent[in_.half], context_->stream), "copying in");
        in_.half = 1 - in_.half;
        in_.used = 0;
        Check(cudaEventSynchronize(in_.sent[in_.half]), "copying in");
      }
      const size_t part = std::min(bytes, kStageBytes - in_.used);
      std::byte* staged = in_.memory + in_.half * kStageBytes + in_.used;
      std::memcpy(staged, source, part);
      Check(cudaMemcpyAsync(target, staged, part, cudaMemcpyHostToDevice, context_->stream),
            "copying in");
      in_.used += part;
      target += part;
      source += part;
      bytes -= part;
    }
  }

  void CopyOut(void* to, const void* from, size_t bytes) override {
    Bind();
    for (size_t at = 0; at < bytes && context_->fault.empty(); at += kStageBytes) {
      const size_t part = std::min(bytes - at, kStageBytes);
      Check(cudaMemcpyAsync(out_, static_cast<const std::byte*>(from) + at, part,
                            cudaMemcpyDeviceToHost, context_->stream),
            "copying out");
      Check(cudaStreamSynchronize(context_->stream), "a kernel");
      if (context_->fault.empty()) std::memcpy(static_cast<std::byte*>(to) + at, out_, part);
    }
    if (timing()) CollectTimes();
  }

  void CopyOutLater(void* to, const void* from, size_t bytes) override {
    FinishCopyOut();
    if (bytes > kStageBytes) return CopyOut(to, from, bytes);
    if (!context_->fault.empty()) return;
    Bind();
    Check(cudaMemcpyAsync(later_.memory, from, bytes, cudaMemcpyDeviceToHost, context_->stream),
          "copying out");
    Check(cudaEventRecord(later_.there, context_->stream), "copying out");
    later_.to = to;
    later_.bytes = bytes;
  }

  void FinishCopyOut() override {
    const size_t bytes = std::exchange(later_.bytes, 0);
    if (bytes == 0) return;
    Bind();
    Check(cudaEventSynchronize(later_.there), "a kernel");
    if (context_->fault.empty()) std::memcpy(later_.to, later_.memory, bytes);
  }

  void CopyWithin(void* to, const void* from, size_t bytes) override {
    if (bytes == 0 || !context_->fault.empty()) return;
    Bind();
    Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, context_->stream),
          "copying within the device");
  }

  void TimeOps(bool on) override {
    Bind();
    if (timing()) CollectTimes();
    if (on && timer_ == nullptr) timer_ = std::make_unique<cuda::OpTimer>(*context_);
    Backend::TimeOps(on);
  }

 private:
  void OpBegins() override {
    Bind();
    if (timer_->full()) CollectTimes();
    timer_->Begin();
  }
  void OpEnds(const TimedCall& call, std::chrono::nanoseconds) override {
    timer_->End();
    timed_calls_.push_back(call);
  }
  void CollectTimes() {
    const std::vector<std::chrono::nanoseconds> times = timer_->Collect();
    for (size_t i = 0; i < times.size(); ++i) AccountTimed(timed_calls_[i], times[i]);
    timed_calls_.clear();
  }

  // The current device belongs to a thread, and more than one calls: who opens, who runs.
  void Bind() const { cudaSetDevice(context_->device); }
  void Check(cudaError_t error, const char* what) { cuda::Ok(*context_, error, what); }

  void Capture(const std::function<void()>& issue, cudaGraphExec_t* executable) {
    Check(cudaStreamBeginCapture(context_->stream, cudaStreamCaptureModeThreadLocal),
          "capturing a graph");
    if (!context_->fault.empty()) return;
    cuda::BeginLateSpans(*context_);
    issue();
    cuda::EndLateSpans(*context_);
    cudaGraph_t graph = nullptr;
    Check(cudaStreamEndCapture(context_->stream, &graph), "capturing a graph");
    if (context_->fault.empty()) {
      Check(cudaGraphInstantiate(executable, graph, 0), "instantiating a graph");
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
  void ForgetGraphs() {
    for (auto& [key, graph] : graphs_) {
      if (graph.executable != nullptr) cudaGraphExecDestroy(graph.executable);
    }
    graphs_.clear();
  }

  std::unique_ptr<cuda::BackendContext> context_;
  Stage in_;
  std::byte* out_;
  LaterCopy later_;
  std::unordered_map<uint64_t, Graph> graphs_;
  std::unique_ptr<cuda::OpTimer> timer_;  // of the first TimeOps(true) on
  std::vector<TimedCall> timed_calls_;    // not collected yet
};

}  // namespace

namespace cuda {

bool Ok(BackendContext& context, cudaError_t error, const char* what) {
  if (error == cudaSuccess) return true;
  if (context.fault.empty()) {
    context.fault =
        std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  }
  return false;
}

bool Ok(BackendContext& context, cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  if (context.fault.empty()) {
    context.fault = std::string(what) + ": " + cublasLtGetStatusString(status);
  }
  return false;
}

}  // namespace cuda

std::unique_ptr<Backend> Backend::Cuda(const CudaOptions& options, std::string* why) {
  const int device = options.device;
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    *why = std::string("no usable GPU: ") +
           (error == cudaSuccess ? "the driver lists none" : cudaGetErrorString(error));
    return nullptr;
  }
  if (device < 0 || device >= count) {
    *why =
        "there is no GPU " + std::to_string(device) + ", the machine has " + std::to_string(count);
    return nullptr;
  }
  cudaDeviceProp properties;
  auto context = std::make_unique<cuda::BackendContext>();
  cuda::BackendContext& c = *context;
  cuda::Ok(c, cudaSetDevice(device), "cudaSetDevice");
  cuda::Ok(c, cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  if (!c.fault.empty()) {
    *why = c.fault;
    return nullptr;
  }
  c.device = device;
  c.deterministic = options.deterministic;
  c.compute_capability = 10 * properties.major + properties.minor;
  if (c.compute_capability < kOldestCapability) {
    std::ostringstream text;
    text << properties.name << " has compute capability " << properties.major << "."
         << properties.minor << ", the least is " << kOldestCapability / 10 << "."
         << kOldestCapability % 10;
    *why = text.str();
    return nullptr;
  }
  // What the code was built for may be less than what the device can.
  cudaFuncAttributes code;
  if (!cuda::Ok(c, cudaFuncGetAttributes(&code, Nothing), "looking for code for this GPU")) {
    *why = std::string(properties.name) + ": " + c.fault;
    return nullptr;
  }
  c.compute_capability = std::min(c.compute_capability, code.ptxVersion);
  c.sm_count = properties.multiProcessorCount;
  c.l2_bytes = properties.l2CacheSize;
  c.max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  Stage in;
  std::byte* out = nullptr;
  LaterCopy later;
  cuda::Ok(c, cudaStreamCreateWithFlags(&c.stream, cudaStreamNonBlocking), "creating a stream");
  cuda::Ok(c, cudaMallocHost(&in.memory, 2 * kStageBytes), "allocating pinned memory");
  cuda::Ok(c, cudaMallocHost(&out, kStageBytes), "allocating pinned memory");
  cuda::Ok(c, cudaMallocHost(&later.memory, kStageBytes), "allocating pinned memory");
  for (cudaEvent_t* event : {&in.sent[0], &in.sent[1], &later.there}) {
    cuda::Ok(c, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
  }
  cuda::Ok(c, cudaMalloc(&c.workspace, cuda::BackendContext::kWorkspaceBytes),
           "allocating the workspace");
  cuda::Ok(c, cublasLtCreate(&c.cublas), "opening cuBLASLt");
  if (!c.fault.empty()) {
    *why = std::string(properties.name) + ": " + c.fault;
    return nullptr;
  }
  std::ostringstream name;
  name << "cuda:" << device << " (" << properties.name << ", " << (properties.totalGlobalMem >> 20)
       << " MiB" << (c.deterministic ? ", deterministic)" : ")");
  return std::make_unique<CudaBackend>(std::move(context), in, out, later, name.str());
}

}  // namespace longspan
