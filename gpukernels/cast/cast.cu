// Checkpoint values to parameters, on the device: cast, transposed where asked, and what the cast loses counted.
//
// Compiled for one pair of formats, -DSOURCE=... -DTARGET=... (0 F32, 1 F16, 2 BF16). All that a thread does is
// in functions that are plain C as well, so that a test can run them without a GPU; conversions are integer
// arithmetic, bit for bit the same everywhere, and memory is what they wait for: 2 to 8 bytes a value.

#define F32 0
#define F16 1
#define BF16 2

#ifdef __CUDACC__
#define FUNCTION __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define FUNCTION static inline
#define UNROLL
typedef struct __attribute__((aligned(16))) { unsigned x, y, z, w; } uint4;
#endif

#if SOURCE == F32
typedef unsigned source_t;
#else
typedef unsigned short source_t;
#endif
#if TARGET == F32
typedef unsigned target_t;
#else
typedef unsigned short target_t;
#endif

#define INFINITE 0x7F800000u
// The smallest normal number of each format, as a float32.
#define SOURCE_NORMAL (SOURCE == F16 ? 0x38800000u : 0x00800000u)
#define TARGET_NORMAL (TARGET == F16 ? 0x38800000u : 0x00800000u)

#define THREADS 256
#define WIDE 8  // values that a thread moves at a time: 16 bytes of a half-precision format
#define TILE 64
#define PITCH 65  // of a tile in shared memory: a column's values then lie in different banks

struct losses {
    unsigned nonfinite, overflowed, underflowed, subnormal;
    unsigned error;  // a float32's bits: of numbers from 0 on, these are ordered as the numbers are
};

FUNCTION unsigned bits_of(float value) {
    union { float value; unsigned bits; } both;
    both.value = value;
    return both.bits;
}

// --- values, as the bits of a float32

FUNCTION unsigned from_half(unsigned half) {
    unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3FFu;
    if (exponent == 31) return sign | INFINITE | mantissa << 13;
    if (exponent == 0) return sign | bits_of((float)mantissa * 5.9604644775390625e-8f);  // in units of 2^-24
    return sign | (exponent + 112) << 23 | mantissa << 13;
}

FUNCTION unsigned to_half(unsigned bits) {
    unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > INFINITE) return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // from 65520 on
    if (magnitude >= 0x38800000u) return sign | ((magnitude + 0xFFFu + (magnitude >> 13 & 1)) >> 13) - (112u << 10);
    if (magnitude <= 0x33000000u) return sign;  // up to 2^-25
    // A subnormal number, in units of 2^-24; what is shifted out decides the rounding.
    unsigned shift = 126 - (magnitude >> 23), mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
    unsigned result = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
    return sign | (result + (rest > middle || (rest == middle && (result & 1))));
}

FUNCTION unsigned to_brain(unsigned bits) {
    if ((bits & 0x7FFFFFFFu) > INFINITE) return bits >> 16 | 0x40u;
    return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

FUNCTION unsigned decode(source_t value) {
    return SOURCE == F32 ? value : SOURCE == F16 ? from_half(value) : (unsigned)value << 16;
}

FUNCTION unsigned decode_target(target_t value) {
    return TARGET == F32 ? value : TARGET == F16 ? from_half(value) : (unsigned)value << 16;
}

FUNCTION target_t encode(unsigned bits) {
    return (target_t)(TARGET == F32 ? bits : TARGET == F16 ? to_half(bits) : to_brain(bits));
}

// Casts one value and counts what it loses; see `Losses` in losses.py.
FUNCTION target_t cast(source_t value, struct losses* lost) {
    unsigned bits = decode(value), before = bits & 0x7FFFFFFFu;
    target_t result = SOURCE == TARGET ? (target_t)value : encode(bits);
    unsigned after = decode_target(result) & 0x7FFFFFFFu;
    lost->nonfinite += before >= INFINITE;
    lost->overflowed += before < INFINITE && after >= INFINITE;
    lost->underflowed += before != 0 && after == 0;
    lost->subnormal += before >= SOURCE_NORMAL && after != 0 && after < TARGET_NORMAL;
    if (before >= TARGET_NORMAL && after < INFINITE) {
        // Both in units of the value's last place: whole numbers below 2^24, so only the division rounds.
        unsigned distance = after > before ? after - before : before - after;
        unsigned error = bits_of((float)distance / (float)((before & 0x7FFFFFu) | 0x800000u));
        if (error > lost->error) lost->error = error;
    }
    return result;
}

// --- eight values at a time, from and to multiples of 16 bytes

FUNCTION void load_wide(const source_t* from, source_t* values) {
#if SOURCE == F32
    uint4 first = ((const uint4*)from)[0], second = ((const uint4*)from)[1];
    values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
    values[4] = second.x, values[5] = second.y, values[6] = second.z, values[7] = second.w;
#else
    uint4 pairs = *(const uint4*)from;
    values[0] = (source_t)pairs.x, values[1] = (source_t)(pairs.x >> 16);
    values[2] = (source_t)pairs.y, values[3] = (source_t)(pairs.y >> 16);
    values[4] = (source_t)pairs.z, values[5] = (source_t)(pairs.z >> 16);
    values[6] = (source_t)pairs.w, values[7] = (source_t)(pairs.w >> 16);
#endif
}

FUNCTION void store_16_bytes(uint4 value, void* to) {
#ifdef __CUDACC__
    // In words of its own: NVRTC makes four stores of the assignment where a loop is around it.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
#else
    *(uint4*)to = value;
#endif
}

FUNCTION void store_wide(const target_t* values, target_t* to) {
#if TARGET == F32
    uint4 first = {values[0], values[1], values[2], values[3]}, second = {values[4], values[5], values[6], values[7]};
    store_16_bytes(first, to), store_16_bytes(second, to + 4);
#else
    uint4 pairs = {
        values[0] | (unsigned)values[1] << 16, values[2] | (unsigned)values[3] << 16,
        values[4] | (unsigned)values[5] << 16, values[6] | (unsigned)values[7] << 16,
    };
    store_16_bytes(pairs, to);
#endif
}

// --- what one thread does

// In the order of the file: thread `first` of `step`. `wide`: both ends lie at multiples of 16 bytes.
FUNCTION void cast_in_order(
    const source_t* source, target_t* out, long long count, int wide, long long first, long long step,
    struct losses* lost
) {
    source_t before[WIDE];
    target_t after[WIDE];
    long long whole = wide ? count / WIDE : 0;
    for (long long i = first; i < whole; i += step) {
        load_wide(source + i * WIDE, before);
        UNROLL
        for (int k = 0; k < WIDE; k++) after[k] = cast(before[k], lost);
        store_wide(after, out + i * WIDE);
    }
    for (long long i = whole * WIDE + first; i < count; i += step) out[i] = cast(source[i], lost);
}

// From source (rows, columns) into a tile, as much of it as there is.
FUNCTION void load_tile(
    const source_t* source, long long rows, long long columns, long long row, long long column, int wide,
    int thread, target_t* tile, struct losses* lost
) {
    source_t before[WIDE];
    for (int part = thread; part < TILE * TILE / WIDE; part += THREADS) {
        int r = part / (TILE / WIDE), c = part % (TILE / WIDE) * WIDE;
        if (row + r >= rows) continue;
        const source_t* from = source + (row + r) * columns + column + c;
        target_t* to = tile + r * PITCH + c;
        if (wide && column + c + WIDE <= columns) {
            load_wide(from, before);
            UNROLL
            for (int k = 0; k < WIDE; k++) to[k] = cast(before[k], lost);
        } else {
            for (int k = 0; k < WIDE && column + c + k < columns; k++) to[k] = cast(from[k], lost);
        }
    }
}

// From a tile into out (columns, stride), transposed.
FUNCTION void store_tile(
    const target_t* tile, long long rows, long long columns, long long row, long long column, int wide, int thread,
    target_t* out, long long stride
) {
    target_t values[WIDE];
    for (int part = thread; part < TILE * TILE / WIDE; part += THREADS) {
        int c = part / (TILE / WIDE), r = part % (TILE / WIDE) * WIDE;
        if (column + c >= columns) continue;
        target_t* to = out + (column + c) * stride + row + r;
        const target_t* from = tile + r * PITCH + c;
        if (wide && row + r + WIDE <= rows) {
            UNROLL
            for (int k = 0; k < WIDE; k++) values[k] = from[k * PITCH];
            store_wide(values, to);
        } else {
            for (int k = 0; k < WIDE && row + r + k < rows; k++) to[k] = from[k * PITCH];
        }
    }
}

// --- kernels; every argument has 64 bits

#ifdef __CUDACC__

// Whole numbers and a maximum: the same in whatever order they are added up.
FUNCTION void add_up(struct losses lost, unsigned long long* counters) {
    __shared__ unsigned total[5];
    unsigned mine[5] = {lost.nonfinite, lost.overflowed, lost.underflowed, lost.subnormal, lost.error};
    if (threadIdx.x < 5) total[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 5; i++) {
        for (int offset = 16; offset; offset /= 2) {
            unsigned other = __shfl_down_sync(0xFFFFFFFFu, mine[i], offset);
            mine[i] = i < 4 ? mine[i] + other : max(mine[i], other);
        }
        if (threadIdx.x % 32 == 0 && mine[i]) {
            if (i < 4) atomicAdd(total + i, mine[i]);
            else atomicMax(total + i, mine[i]);
        }
    }
    __syncthreads();
    if (threadIdx.x < 4 && total[threadIdx.x]) atomicAdd(counters + threadIdx.x, (unsigned long long)total[threadIdx.x]);
    if (threadIdx.x == 4) atomicMax(counters + 4, (unsigned long long)total[4]);
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_flat(
    const source_t* __restrict__ source, target_t* __restrict__ out, long long count, long long wide,
    unsigned long long* counters
) {
    struct losses lost = {0, 0, 0, 0, 0};
    long long first = blockIdx.x * (long long)THREADS + threadIdx.x, step = gridDim.x * (long long)THREADS;
    cast_in_order(source, out, count, wide, first, step, &lost);
    add_up(lost, counters);
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_transposed(
    const source_t* __restrict__ source, target_t* __restrict__ out, long long rows, long long columns,
    long long stride, long long wide_source, long long wide_out, unsigned long long* counters
) {
    __shared__ target_t tile[TILE * PITCH];
    struct losses lost = {0, 0, 0, 0, 0};
    long long down = (rows + TILE - 1) / TILE, tiles = down * ((columns + TILE - 1) / TILE);
    for (long long each = blockIdx.x; each < tiles; each += gridDim.x) {
        long long row = each % down * TILE, column = each / down * TILE;
        load_tile(source, rows, columns, row, column, wide_source, threadIdx.x, tile, &lost);
        __syncthreads();
        store_tile(tile, rows, columns, row, column, wide_out, threadIdx.x, out, stride);
        __syncthreads();
    }
    add_up(lost, counters);
}

#endif
