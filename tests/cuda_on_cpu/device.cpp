// The device that the kernels believe to run on, and the checks of a launch.
#include <cstdlib>
#include <map>

#include "cuda_runtime.h"
#include "machine.h"

namespace cuda_on_cpu {

namespace {

struct KernelAttributes {
  size_t max_dynamic = kStaticLimit;
  bool large_cluster = false;
};
std::map<const void*, KernelAttributes> attributes;

int setting(const char* name, int fallback) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoi(value) : fallback;
}

int arch() { return setting("KDK_CPU_ARCH", 90); }

// Bytes a block may have and blocks a cluster may have, of the GPUs that we build for.
int smem_optin() {
  const int a = arch();
  return setting("KDK_CPU_SMEM", (a == 80 || a == 87 ? 163 : a >= 90 && a < 120 ? 227 : 99) * 1024);
}
int max_cluster() { return setting("KDK_CPU_MAX_CLUSTER", arch() >= 90 ? 16 : 1); }

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

int check(const LaunchParameters& p, const void* kernel) {
  const KernelAttributes& a = attributes[kernel];
  const unsigned cluster = volume(p.cluster);
  if (!volume(p.grid) || p.grid.y > 65535 || p.grid.z > 65535 || p.grid.x > 0x7fffffffu)
    return cudaErrorInvalidConfiguration;
  if (!volume(p.block) || volume(p.block) > 1024 || p.block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (p.dynamic_smem > a.max_dynamic) return cudaErrorInvalidValue;
  if (cluster > 1) {
    if (max_cluster() == 1) return cudaErrorNotSupported;
    if (cluster > (a.large_cluster ? static_cast<unsigned>(max_cluster()) : 8u))
      return cudaErrorInvalidClusterSize;
    if (p.grid.x % p.cluster.x || p.grid.y % p.cluster.y || p.grid.z % p.cluster.z)
      return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

}  // namespace

int device_attribute(int attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 * 1024;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMultiProcessorCount: return setting("KDK_CPU_SMS", arch() >= 90 ? 132 : 108);
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return arch() / 10;
    case cudaDevAttrComputeCapabilityMinor: return arch() % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return smem_optin() + 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return smem_optin();
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrClusterLaunch: return max_cluster() > 1;
  }
  return -1;
}

int set_attribute(const void* kernel, int attribute, int value) {
  KernelAttributes& a = attributes[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > smem_optin()) return cudaErrorInvalidValue;
    a.max_dynamic = static_cast<size_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    a.large_cluster = value != 0;
  }
  return cudaSuccess;
}

int max_active_clusters(const LaunchParameters& p, const void* kernel) {
  if (const int error = check(p, kernel)) return -error;
  const int by_threads = 2048 / static_cast<int>(volume(p.block));
  const int by_smem = (smem_optin() + 1024) / static_cast<int>(p.dynamic_smem + 1024);
  const int per_sm = by_threads < by_smem ? by_threads : by_smem;
  const int blocks = per_sm * device_attribute(cudaDevAttrMultiProcessorCount);
  return setting("KDK_CPU_ACTIVE_CLUSTERS", blocks / static_cast<int>(volume(p.cluster)));
}

int launch(const LaunchParameters& p, const void* kernel, KernelBody body, void* arguments) {
  if (const int error = check(p, kernel)) return error;
  execute(p, body, arguments);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu
