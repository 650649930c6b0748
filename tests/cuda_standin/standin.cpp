// A CUDA device for a torch that was built for the CPU alone. Its tensors are on `cuda:0` (device type, dispatch key,
// storage); their memory is the host's, and the CPU's kernels compute them.
//
// Real mode: each operation is computed, by the CPU's kernel on the same bytes.
// Shape mode: an operation on large floating-point operands is not computed. Shape, strides and dtype of its results
// come from the meta kernel, and they lie in address space that no page backs, so that models of any size fit.
//
// As on a CUDA device, operands on different devices are an error, a graph being captured refuses what would wait for
// the device, and memory comes from a caching allocator with a limit. Kernels and waits are counted, and a roofline
// model gives each kernel a time.
//
// Loaded before torch is imported: torch asks for the hooks of CUDA while it is imported and keeps the answer.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "allocator.h"

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Stream;
using torch::jit::Stack;

const Device DEVICE(c10::kCUDA, 0);
std::recursive_mutex mutex;  // never held while a kernel runs: it may be Python's
using Lock = std::lock_guard<std::recursive_mutex>;

bool is_shape_mode = false;
constexpr double COMPUTED_BELOW = 256 << 10;         // bytes of operands that are computed in shape mode too
constexpr double INTEGERS_COMPUTED_BELOW = 64 << 20;  // the same of integers, and of what is copied to the host

// ------------------------------------------------------------------------------------------------- memory

struct Allocation {
  size_t bytes;
  caching::Block* block;
  int holders = 1;  // the tensor's storage, and graphs that wrote down its address
};
caching::Allocator accounts;
std::unordered_map<void*, Allocation> allocations;
constexpr size_t MAPPED_FROM = 64 << 10;

void drop(void* pointer) {
  Lock lock(mutex);
  auto found = allocations.find(pointer);
  if (--found->second.holders) return;
  if (found->second.bytes >= MAPPED_FROM) {
    munmap(pointer, found->second.bytes);
  } else {
    free(pointer);
  }
  allocations.erase(found);
}

void release(void* pointer) {
  if (!pointer) return;
  Lock lock(mutex);
  accounts.release(allocations.at(pointer).block);
  drop(pointer);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, DEVICE};
    Lock lock(mutex);
    size_t bytes = (size + 511) / 512 * 512;
    caching::Block* block = accounts.allocate(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, block, "CUDA out of memory. Tried to allocate ", bytes >> 20, " MiB. The stand-in has ",
                     accounts.limit >> 20, " MiB, of which ", accounts.allocated >> 20, " MiB are allocated and ",
                     accounts.reserved >> 20, " MiB reserved.");
    void* pointer = nullptr;
    if (bytes >= MAPPED_FROM) {
      pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(pointer != MAP_FAILED, "the stand-in found no address space");
    } else {
      TORCH_CHECK(posix_memalign(&pointer, 512, bytes) == 0);
      memset(pointer, 0, bytes);
    }
    allocations[pointer] = Allocation{bytes, block};
    return {pointer, pointer, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} device_allocator;

std::unordered_set<const void*> pinned;

void release_pinned(void* pointer) {
  {
    Lock lock(mutex);
    pinned.erase(pointer);
  }
  free(pointer);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, 64, std::max<size_t>(bytes, 1)) == 0);
    Lock lock(mutex);
    pinned.insert(pointer);
    return {pointer, pointer, &release_pinned, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} pinned_allocator;

// ------------------------------------------------------------------------------- kernels, waits and their time

struct Roofline {
  double flops = 100e12, bandwidth = 800e9;  // a second
  double launch = 10e-6, kernel = 2e-6;      // seconds that the host and the device need for any kernel
} roofline;

struct Statistics {
  int64_t kernels = 0, replays = 0;
  std::map<std::string, int64_t> counts, waits;
  std::map<std::string, double> seconds;
  double host = 0, device = 0, busy = 0, waited = 0;  // clocks of both in seconds, and sums
} statistics;

// The operations of a graph on the bytes that they were captured with, as tensors of the CPU. In a graph, too, memory is
// used again once its tensor is gone, so these hold bytes and no tensors of the device.
struct Recorded {
  c10::OperatorHandle operation;
  std::vector<IValue> arguments, results;
};
struct Graph {
  std::vector<Recorded> operations;
  double seconds = 0;
};
std::map<int64_t, Graph> graphs;
int64_t last_graph = 0;
Graph* captured = nullptr;

void count_kernel(const std::string& name, double flops, double bytes) {
  Lock lock(mutex);
  double seconds = roofline.kernel + std::max(flops / roofline.flops, bytes / roofline.bandwidth);
  if (captured) {
    captured->seconds += seconds;
    return;
  }
  statistics.kernels++;
  statistics.counts[name]++;
  statistics.seconds[name] += seconds;
  statistics.busy += seconds;
  statistics.host += roofline.launch;
  statistics.device = std::max(statistics.device, statistics.host) + seconds;
}

// A copy that neither waits.
void count_copy(const std::string& name) {
  Lock lock(mutex);
  statistics.counts[name]++;
}

// The host waits until the device is done.
void wait(const std::string& reason) {
  Lock lock(mutex);
  TORCH_CHECK(!captured, "CUDA error: operation not permitted when stream is capturing (", reason, ")");
  statistics.waits[reason]++;
  if (statistics.device > statistics.host) {
    statistics.waited += statistics.device - statistics.host;
    statistics.host = statistics.device;
  }
}

// ------------------------------------------------------------------------------------- device and its hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
  bool isStreamCapturing(const Stream&) const override { return captured != nullptr; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override {
    Lock lock(mutex);
    return pinned.count(pointer) > 0;
  }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::globalContext().defaultGenerator(Device(kCPU));
  }
  void deviceSynchronize(DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {

// ------------------------------------------------------------------------------- the same bytes elsewhere

at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = tensor.options().device(c10::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::for_blob(tensor.data_ptr(), tensor.sizes()).strides(tensor.strides()).options(options).make_tensor();
}

at::Tensor on_meta(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
}

at::Tensor new_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype) {
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::Tensor(at::detail::empty_strided_generic(sizes, strides, &device_allocator, keys, dtype));
}

double bytes_of(const at::Tensor& tensor) {
  return tensor.defined() ? double(tensor.numel()) * double(tensor.itemsize()) : 0;
}

bool is_defined(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

// The value with `change` applied to each tensor in it.
template <class Change>
IValue with_tensors(const IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(is_defined(tensor) ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

// The values with CPU tensors on the same bytes, which stay for as long as these do.
std::vector<IValue> kept_on_cpu(const std::vector<IValue>& values) {
  std::vector<IValue> kept;
  for (const IValue& value : values)
    kept.push_back(with_tensors(value, [](const at::Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cuda() || tensor.numel() == 0) return on_cpu(tensor);
      Lock lock(mutex);
      void* memory = tensor.storage().mutable_data();
      allocations.at(memory).holders++;
      return at::for_blob(tensor.data_ptr(), tensor.sizes())
          .strides(tensor.strides())
          .deleter([memory](void*) { drop(memory); })
          .options(tensor.options().device(c10::kCPU))
          .make_tensor();
    }));
  return kept;
}

template <class Visit>
void for_each_tensor(const IValue& value, Visit visit) {
  with_tensors(value, [&](const at::Tensor& tensor) {
    if (tensor.defined()) visit(tensor);
    return tensor;
  });
}

// ------------------------------------------------------------------------------------------- one operation

bool starts_with(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

bool is_fused_attention(const std::string& name) {
  return starts_with(name, "aten::_scaled_dot_product_flash") || starts_with(name, "aten::_scaled_dot_product_efficient");
}

double flops_of(const std::string& name, const std::vector<IValue>& arguments) {
  auto product = [&](int first) {
    return 2.0 * arguments[first].toTensor().numel() * arguments[first + 1].toTensor().size(-1);
  };
  if (name == "aten::mm" || name == "aten::bmm") return product(0);
  if (name == "aten::addmm" || name == "aten::baddbmm") return product(1);
  if (name == "standin::addmm_fp32") return product(1);
  if (name == "standin::gemm_4bit") return 2.0 * arguments[0].toTensor().numel() * arguments[2].toIntVector()[0];
  if (starts_with(name, "standin::sequence_attention")) {  // each sequence by itself, causal
    bool is_backward = name.find("_backward") != std::string::npos;
    const at::Tensor query = arguments[is_backward].toTensor();
    at::Tensor lengths = on_cpu(arguments[is_backward + 3].toTensor()).diff().to(at::kDouble);
    return (is_backward ? 5.0 : 2.0) * lengths.square().sum().item<double>() * query.size(1) * query.size(2);
  }
  if (is_fused_attention(name)) {
    bool is_backward = name.find("_backward") != std::string::npos, is_flash = name.find("flash") != std::string::npos;
    const at::Tensor query = arguments[is_backward].toTensor(), key = arguments[is_backward + 1].toTensor();
    bool is_causal = is_backward ? is_flash : arguments[is_flash ? 4 : 6].toBool();
    return (is_backward ? 10.0 : 4.0) * query.numel() * key.size(2) * (is_causal ? 0.5 : 1.0);
  }
  return 0;
}

// Bytes that the device reads and writes.
double traffic_of(const std::string& name, const std::vector<IValue>& arguments, const std::vector<IValue>& results) {
  static const std::map<std::string, int> writes_a_part = {{"aten::index_copy", 3},
                                                           {"aten::index_copy_", 3},
                                                           {"aten::_index_put_impl_", 2},
                                                           {"aten::scatter", 3},
                                                           {"aten::index_fill_", 2}};
  static const std::unordered_set<std::string> reads_a_part = {"aten::index", "aten::index_select", "aten::gather",
                                                               "aten::embedding"};
  auto part = writes_a_part.find(name);
  if (part != writes_a_part.end() && arguments[part->second].isTensor())
    return 2 * bytes_of(arguments[part->second].toTensor());
  double bytes = 0;
  auto add = [&](const at::Tensor& tensor) { bytes += bytes_of(tensor); };
  for (const IValue& value : results) for_each_tensor(value, add);
  if (reads_a_part.count(name)) return 2 * bytes;
  for (const IValue& value : arguments) for_each_tensor(value, add);
  return bytes;
}

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

// Meta kernels are slow, many being Python's, and a model asks the same again in each layer: what they gave by operation
// and arguments.
std::unordered_map<std::string, Stack> meta_results;

void append(std::string& key, const void* data, size_t bytes) { key.append(static_cast<const char*>(data), bytes); }

// Adds the value to a key; false where it is of a kind that has none.
bool append(std::string& key, const IValue& value) {
  key.push_back('|');
  auto add = [&](const at::Tensor& tensor) {
    key.push_back(tensor.defined() ? char('A' + int(tensor.scalar_type())) : '-');
    if (tensor.defined()) {
      key.push_back(char(tensor.dim()));
      append(key, tensor.sizes().data(), tensor.dim() * sizeof(int64_t));
      append(key, tensor.strides().data(), tensor.dim() * sizeof(int64_t));
    }
  };
  if (value.isNone()) return true;
  if (value.isTensor()) {
    add(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) add(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) add(tensor.value_or(at::Tensor()));
  } else if (value.isInt() || value.isDouble() || value.isBool() || value.isIntList() || value.isBoolList() ||
             value.isDoubleList() || value.isString()) {
    std::ostringstream text;
    text << value.tagKind() << std::hexfloat << value;
    key += text.str();
  } else {
    return value.isDevice();
  }
  return true;
}

void run_meta(const c10::OperatorHandle& operation, const std::vector<IValue>& arguments, Stack& stack) {
  std::string key = operation.schema().name() + "." + operation.schema().overload_name();
  bool has_key = true;
  for (const IValue& argument : arguments) has_key = has_key && append(key, argument);
  {
    Lock lock(mutex);
    auto found = has_key ? meta_results.find(key) : meta_results.end();
    if (found != meta_results.end()) {
      stack = found->second;
      return;
    }
  }
  operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  Lock lock(mutex);
  if (has_key) meta_results[key] = stack;
}

// The results of an operation, from the CPU's kernel or the meta kernel. `into`: the tensors that take them.
std::vector<IValue> run(const c10::OperatorHandle& operation, const std::vector<IValue>& arguments, bool is_computed,
                        const std::vector<IValue>* into) {
  const auto& schema = operation.schema();
  const auto device = is_computed ? c10::kCPU : c10::kMeta;
  Stack stack;
  std::vector<at::Tensor> outputs(arguments.size());  // `out` arguments without elements, which the kernel resizes
  bool has_outputs = false;
  for (size_t i = 0; i < arguments.size(); i++) {
    const IValue& argument = arguments[i];
    bool is_output = is_written(schema.arguments()[i]) && argument.isTensor() && argument.toTensor().defined();
    if (is_output && argument.toTensor().numel() == 0) {
      outputs[i] = at::empty({0}, argument.toTensor().options().device(device));
      stack.emplace_back(outputs[i]);
      has_outputs = true;
    } else if (argument.isDevice()) {
      stack.emplace_back(Device(device));
    } else {
      stack.push_back(with_tensors(argument, [&](const at::Tensor& t) { return is_computed ? on_cpu(t) : on_meta(t); }));
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (is_computed || has_outputs) {
      auto key = is_computed ? c10::DispatchKey::CPU : c10::DispatchKey::Meta;
      operation.redispatchBoxed(c10::DispatchKeySet(key), &stack);
    } else {
      run_meta(operation, arguments, stack);
    }
  }
  for (size_t i = 0; i < arguments.size(); i++) {
    if (!outputs[i].defined() || outputs[i].numel() == 0) continue;
    at::Tensor output = arguments[i].toTensor();
    output.resize_(outputs[i].sizes());
    if (is_computed) on_cpu(output).copy_(outputs[i]);
  }

  auto on_device = [&](const at::Tensor& result, const at::Tensor& place) {
    if (!result.defined()) return result;
    at::Tensor tensor = place.defined() ? place : new_tensor(result.sizes(), result.strides(), result.scalar_type());
    if (is_computed && result.numel()) on_cpu(tensor).copy_(result);
    return tensor;
  };
  std::vector<IValue> results;
  for (size_t r = 0; r < schema.returns().size(); r++) {
    const auto* alias = schema.returns()[r].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t i = 0; i < arguments.size() && results.size() == r; i++)
        if (is_written(schema.arguments()[i]) &&
            schema.arguments()[i].alias_info()->beforeSets() == alias->beforeSets())
          results.push_back(arguments[i]);
      TORCH_CHECK(results.size() == r + 1, "the stand-in found no argument that ", schema.name(), " returns");
    } else if (stack[r].isTensor()) {
      TORCH_CHECK(!alias, "the stand-in has no kernel for the view ", schema.name());
      results.emplace_back(on_device(stack[r].toTensor(), into ? (*into)[r].toTensor() : at::Tensor()));
    } else if (stack[r].isTensorList()) {
      c10::List<at::Tensor> list;
      auto tensors = stack[r].toTensorVector();
      for (size_t n = 0; n < tensors.size(); n++)
        list.push_back(on_device(tensors[n], into ? (*into)[r].toTensorVector()[n] : at::Tensor()));
      results.emplace_back(list);
    } else {
      results.push_back(stack[r]);
    }
  }
  return results;
}

// Boolean indices as numbers: a CUDA build looks for the true elements, and waits to learn how many there are.
IValue with_integer_indices(const IValue& indices, const std::string& name) {
  c10::List<std::optional<at::Tensor>> expanded;
  for (const std::optional<at::Tensor>& index : indices.toOptionalTensorVector()) {
    if (!is_defined(index) || (index->scalar_type() != at::kBool && index->scalar_type() != at::kByte)) {
      expanded.push_back(index);
      continue;
    }
    wait("nonzero in " + name);
    count_kernel("aten::nonzero", 0, bytes_of(*index));
    at::Tensor found = on_cpu(*index).nonzero();
    for (int64_t d = 0; d < index->dim(); d++) {
      at::Tensor column = new_tensor({found.size(0)}, {1}, at::kLong);
      if (found.size(0)) on_cpu(column).copy_(found.select(1, d));
      expanded.push_back(column);
    }
  }
  return expanded;
}

void run_on_device(const c10::OperatorHandle& operation, Stack* stack) {
  static const std::unordered_set<std::string> waits = {
      "aten::nonzero", "aten::masked_select",      "aten::unique_dim", "aten::_unique",
      "aten::_unique2", "aten::unique_consecutive", "aten::equal",
  };
  const auto& schema = operation.schema();
  const std::string& name = schema.name();
  size_t count = schema.arguments().size();
  std::vector<IValue> arguments(stack->end() - count, stack->end());
  stack->erase(stack->end() - count, stack->end());

  double bytes = 0;
  bool has_floats = false;
  for (size_t i = 0; i < count; i++)
    for_each_tensor(arguments[i], [&](const at::Tensor& tensor) {
      bytes += bytes_of(tensor);
      has_floats = has_floats || at::isFloatingType(tensor.scalar_type());
      if (tensor.device() == DEVICE || tensor.dim() == 0) return;
      if (arguments[i].isOptionalTensorList()) {  // indices may be on the CPU
        wait("copy of indices to the device");
        return;
      }
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                  tensor.device(), "! (argument ", schema.arguments()[i].name(), " of ", schema, ")");
    });
  for (IValue& argument : arguments)
    if (argument.isOptionalTensorList()) argument = with_integer_indices(argument, name);

  bool is_computed = !is_shape_mode || bytes < COMPUTED_BELOW || (!has_floats && bytes < INTEGERS_COMPUTED_BELOW);
  if (is_fused_attention(name)) is_computed = false;  // the CPU has no such kernel; chosen in shape mode alone
  // Of sums that were not computed: a log of 0 would make the loss infinite.
  if (is_shape_mode && starts_with(name, "aten::log")) is_computed = false;
  if (waits.count(name) || (name == "aten::repeat_interleave" && schema.overload_name() == "Tensor")) wait(name);
  std::vector<IValue> results = run(operation, arguments, is_computed && !captured, nullptr);
  count_kernel(name, flops_of(name, arguments), traffic_of(name, arguments, results));
  if (captured && is_computed) captured->operations.push_back({operation, kept_on_cpu(arguments), kept_on_cpu(results)});
  for (IValue& value : results) stack->push_back(std::move(value));
}

// ------------------------------------------------------------- what every device implements by itself in torch

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::Tensor(at::detail::empty_generic(sizes, &device_allocator, keys, c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>) {
  return new_tensor(sizes, strides, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef sizes) { return at::native::view(self, sizes); }

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::_reshape_alias(self, sizes, strides);
}

at::Tensor unfold(const at::Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef sizes, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(self, sizes, format);
}

at::Tensor& set_source(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef sizes,
                       c10::IntArrayRef strides) {
  return at::cpu::set_(self, source, offset, sizes, strides);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  int64_t elements = source.nbytes() / self.itemsize();
  return at::cpu::set_(self, source, 0, {elements}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::cpu::set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  wait("item");
  return on_cpu(self).item();
}

void copy_bytes(const at::Tensor& to, const at::Tensor& from) {
  at::NoGradGuard no_gradient;
  at::AutoDispatchBelowADInplaceOrView below;
  on_cpu(to).copy_(on_cpu(from));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.numel() == 0) return self;
  double bytes = bytes_of(self) + bytes_of(source);
  bool is_read = !at::isFloatingType(self.scalar_type()) || !self.is_cuda();
  bool is_computed = !is_shape_mode || bytes < COMPUTED_BELOW || (is_read && bytes < INTEGERS_COMPUTED_BELOW);
  if (self.is_cuda() && source.is_cuda()) {
    count_kernel("aten::copy_", 0, bytes);
    if (captured) {
      static auto operation = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
      if (is_computed)
        captured->operations.push_back({operation, kept_on_cpu({self, source, non_blocking}), kept_on_cpu({self})});
      return self;
    }
  } else {
    std::string reason = self.is_cuda() ? "copy to the device" : "copy to the host";
    if (non_blocking && (self.is_cuda() ? source : self).is_pinned()) {
      TORCH_CHECK(!captured, "the stand-in captures no copies of pinned memory");
      count_copy(reason);
    } else {
      wait(reason);
    }
  }
  if (is_computed) copy_bytes(self, source);
  return self;
}

void record_stream(at::Tensor&, c10::Stream) {}

int64_t attention_choice(const at::Tensor& query, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  if (!is_shape_mode) return int64_t(at::SDPBackend::math);  // which the CPU computes
  bool is_half = query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf;
  if (!is_defined(mask) && is_half && query.size(-1) <= 256) return int64_t(at::SDPBackend::flash_attention);
  if (is_half || query.scalar_type() == at::kFloat) return int64_t(at::SDPBackend::efficient_attention);
  return int64_t(at::SDPBackend::math);
}

const bool is_allocator_set = [] {
  c10::SetAllocator(c10::kCUDA, &device_allocator);
  return true;
}();
}  // namespace

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &attention_choice);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_device>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage_storage_offset", set_source);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("copy_", copy_);
  library.impl("record_stream", record_stream);
}

// --------------------------------------------------------------------------------- what Python calls (ctypes)

namespace {
std::string text;  // that the last call returned

template <class Value>
void write(std::ostream& out, const std::map<std::string, Value>& values) {
  out << "{";
  const char* separator = "";
  for (const auto& [name, value] : values) {
    out << separator << "\"" << name << "\": " << value;
    separator = ", ";
  }
  out << "}";
}

// The message of an error that `work` raises, or null.
template <class Work>
const char* message_of(Work work) {
  try {
    work();
    return nullptr;
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}
}  // namespace

extern "C" {
void standin_set_shape_mode(bool is_on) { is_shape_mode = is_on; }
void standin_set_limit(int64_t bytes) { accounts.limit = bytes; }
void standin_set_expandable(bool is_on) { accounts.is_expandable = is_on; }
void standin_set_roofline(double flops, double bandwidth, double launch, double kernel) {
  roofline = {flops, bandwidth, launch, kernel};
}

// Runs the operation as those of torch, where its library has a kernel for every device.
void standin_take_over(const char* space, const char* name) {
  static std::map<std::string, std::unique_ptr<torch::Library>> libraries;
  auto& library = libraries[space];
  if (!library)
    library = std::make_unique<torch::Library>(torch::Library::IMPL, space, c10::DispatchKey::CUDA, __FILE__, __LINE__);
  library->impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_device>());
}

int64_t standin_allocated() { return accounts.allocated; }
int64_t standin_reserved() { return accounts.reserved; }
int64_t standin_peak_allocated() { return accounts.peak_allocated; }
int64_t standin_peak_reserved() { return accounts.peak_reserved; }
void standin_reset_peaks() {
  accounts.peak_allocated = accounts.allocated;
  accounts.peak_reserved = accounts.reserved;
}
void standin_empty_cache() {
  Lock lock(mutex);
  accounts.empty_cache();
}

void standin_reset_statistics() {
  Lock lock(mutex);
  statistics = {};
}
const char* standin_statistics() {
  Lock lock(mutex);
  std::ostringstream out;
  out << "{\"kernels\": " << statistics.kernels << ", \"replays\": " << statistics.replays
      << ", \"seconds\": " << std::max(statistics.host, statistics.device) << ", \"busy\": " << statistics.busy
      << ", \"waited\": " << statistics.waited << ", \"counts\": ";
  write(out, statistics.counts);
  out << ", \"waits\": ";
  write(out, statistics.waits);
  out << ", \"seconds_by_kernel\": ";
  write(out, statistics.seconds);
  out << "}";
  text = out.str();
  return text.c_str();
}
void standin_count_kernel(const char* name, double flops, double bytes) {
  count_kernel(name, flops, bytes);
}
const char* standin_wait(const char* reason) {
  return message_of([&] { wait(reason); });
}

bool standin_is_capturing() { return captured != nullptr; }
int64_t standin_begin_capture() {
  Lock lock(mutex);
  captured = &graphs[++last_graph];
  return last_graph;
}
void standin_end_capture() { captured = nullptr; }
void standin_forget(int64_t id) {
  Lock lock(mutex);
  graphs.erase(id);
}
const char* standin_replay(int64_t id) {
  return message_of([&] {
    TORCH_CHECK(!captured, "a graph is replayed while another is captured");
    const Graph& graph = graphs.at(id);
    statistics.replays++;
    statistics.busy += graph.seconds;
    statistics.host += roofline.launch;
    statistics.device = std::max(statistics.device, statistics.host) + graph.seconds;
    at::NoGradGuard no_gradient;
    for (const Recorded& recorded : graph.operations) {
      if (recorded.operation.schema().name() == "aten::copy_") {
        copy_bytes(recorded.arguments[0].toTensor(), recorded.arguments[1].toTensor());
      } else {
        run(recorded.operation, recorded.arguments, true, &recorded.results);
      }
    }
  });
}
}
