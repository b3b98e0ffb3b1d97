// A libcuda.so.1 of an H100 that runs nothing: it says what it was asked to launch, and refuses what a GPU would.

#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>

static int context;  // its address is all that is asked of one
static const char* refused = "no error";

static CUresult no(const char* why) {
    refused = why;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char** text) { return *text = refused, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* current) { return *current = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) { return cuCtxGetCurrent(retained); }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                     ? 132
             : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                              ? 32
             : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN      ? 227 << 10
             : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR   ? 228 << 10
                                                                                       : 65536;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    return *function = (CUfunction)module, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
}

// What the documentation of the driver asks of a tensor map that is not interleaved.
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill
) {
    int element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    unsigned inner = box[0] * element;
    if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
        type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
        return no("a data type that is not in use here");
    if ((unsigned long long)address % 16) return no("an address that is no multiple of 16");
    for (unsigned i = 0; i < rank; i++) {
        if (sizes[i] == 0 || sizes[i] > 1ull << 32) return no("a size of 0, or beyond 2^32");
        if (box[i] == 0 || box[i] > 256) return no("a box of more than 256 elements");
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return no("a stride that TMA cannot have");
    }
    if (inner % 16) return no("a box that is no multiple of 16 bytes");
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B && inner > 32) return no("a box wider than its swizzle of 32 bytes");
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && inner > 64) return no("a box wider than its swizzle of 64 bytes");
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && inner > 128) return no("a box wider than its swizzle of 128 bytes");
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
    return *clusters = 132, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    int dependent = 0, cooperative = 0;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        dependent |= config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        cooperative |= config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    }
    if (config->gridDimY > 65535 || config->gridDimZ > 65535) return no("a grid beyond CUDA's limit");
    if (config->sharedMemBytes > 227 << 10) return no("more shared memory than there is");
    printf(
        "[%u, %u, %u, %u, %u, %d, %d]\n", config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
        config->sharedMemBytes, dependent, cooperative
    );
    return fflush(stdout), CUDA_SUCCESS;
}
