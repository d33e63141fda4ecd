// The part of CUDA's host API that a launcher needs. The device is described by environment
// variables (KDK_CPU_ARCH, ...), a launch runs at once, and streams are ignored.
#pragma once

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t remember(int error) {
  if (error) last_error = static_cast<cudaError_t>(error);
  return static_cast<cudaError_t>(error);
}
inline LaunchParameters parameters(const cudaLaunchConfig_t& c) {
  LaunchParameters p{c.gridDim, c.blockDim, dim3(), c.dynamicSmemBytes};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    const auto& dim = c.attrs[i].val.clusterDim;
    if (c.attrs[i].id == cudaLaunchAttributeClusterDimension) p.cluster = {dim.x, dim.y, dim.z};
  }
  return p;
}
}  // namespace cuda_on_cpu

inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "invalid cluster size";
  }
  return "unknown error";
}
inline const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
inline cudaError_t cudaPeekAtLastError() { return ::cuda_on_cpu::last_error; }
inline cudaError_t cudaGetLastError() {
  return std::exchange(::cuda_on_cpu::last_error, cudaSuccess);
}

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return ::cuda_on_cpu::remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return ::cuda_on_cpu::remember(cudaErrorInvalidDevice);
  *value = ::cuda_on_cpu::device_attribute(attribute);
  return ::cuda_on_cpu::remember(*value < 0 ? cudaErrorInvalidValue : cudaSuccess);
}

template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return ::cuda_on_cpu::remember(
      ::cuda_on_cpu::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value));
}
template <typename Kernel>
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel* kernel,
                                                  const cudaLaunchConfig_t* config) {
  const int n = ::cuda_on_cpu::max_active_clusters(::cuda_on_cpu::parameters(*config),
                                                   reinterpret_cast<const void*>(kernel));
  *count = n < 0 ? 0 : n;
  return ::cuda_on_cpu::remember(n < 0 ? -n : 0);
}
template <typename Kernel>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel* kernel,
                                                                 int threads, size_t smem) {
  ::cuda_on_cpu::LaunchParameters p{dim3(1), dim3(static_cast<unsigned>(threads)), dim3(), smem};
  const int sms = ::cuda_on_cpu::device_attribute(cudaDevAttrMultiProcessorCount);
  const int n = ::cuda_on_cpu::max_active_clusters(p, reinterpret_cast<const void*>(kernel));
  *count = n < 0 ? 0 : n / sms;
  return ::cuda_on_cpu::remember(n < 0 ? -n : 0);
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

template <typename... P, typename... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                                      A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  return ::cuda_on_cpu::remember(::cuda_on_cpu::launch(
      ::cuda_on_cpu::parameters(*config), reinterpret_cast<const void*>(kernel),
      [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args); },
      &call));
}
