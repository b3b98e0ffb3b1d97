"""CUDA C that is given to CuPy, compiled by NVRTC for GPUs that are not here."""

import pytest

from gpukernels.compile_report import CHIPS, compile_cuda

SOURCE = r"""
#include <cuda_fp16.h>
#include <cuda/std/type_traits>

extern "C" __global__ void narrow(const float4* x, uint2* y, long long n) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) {
        float4 v = x[i];
        __half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
        y[i] = make_uint2(*(unsigned*)&a, *(unsigned*)&b);
    }
}

template <typename T> __global__ void shifted(T* x) {
    static_assert(cuda::std::is_floating_point_v<T>);
    __shared__ T part[64];
    part[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = part[(threadIdx.x + 1) % 64];
}
"""


@pytest.mark.parametrize("capability", CHIPS)
def test_what_a_kernel_of_several_needs(capability):
    compiled = compile_cuda(SOURCE, "narrow", capability, threads=128)
    assert 0 < compiled.registers <= 32
    assert compiled.spilled_bytes == compiled.shared_memory == 0
    assert compiled.num_warps == 4
    assert compiled.count("LDG.E.128") == compiled.count("STG.E.64") == 1  # float4 in, two halves twice out
    other = compile_cuda(SOURCE, "shifted<float>", capability)
    assert other.shared_memory == 64 * 4
    assert other.count("LDG.E.128", "STG.E.64") == 0
    assert compile_cuda(SOURCE, "shifted<double>", capability).shared_memory == 64 * 8


def test_options_reach_the_compiler():
    assert compile_cuda(SOURCE, "narrow", 80, ("-maxrregcount=16",)).registers <= 16


def test_refusals_name_the_kernel_and_the_line():
    with pytest.raises(ValueError, match="capability must be one of 80, 89, 90, 100, got 70"):
        compile_cuda(SOURCE, "narrow", 70)
    with pytest.raises(ValueError, match=r'NVRTC refuses wide: .*identifier "wide" is undefined'):
        compile_cuda(SOURCE, "wide", 80)
    with pytest.raises(ValueError, match=r"(?s)NVRTC refuses f: f\.cu\(1\): error: .*a value of type"):
        compile_cuda('extern "C" __global__ void f(int* x) { *x = "no"; }', "f", 80)
