// Vectors of numbers for whatever processor this is compiled for, and work for several threads. Plain C++, no
// dependency. The other sources of this folder are compiled behind this one, as one library that ctypes loads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));

constexpr float HIDDEN = -1e30f, EMPTY = -1e20f, FLOOR = -80.0f;  // exp(FLOOR) is still a normal number

static inline vf splat(float x) { return x - vf{}; }  // vf{} + x is an addition: 0 + -0 is 0
static inline vi splat_int(int32_t x) { return vi{} + x; }
static inline vf max(vf a, vf b) { return a > b ? a : b; }

static inline bool any(vi m) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#else
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= m[i];
    return found != 0;
#endif
}

// exp of numbers up to about 80; below FLOOR it is 0. Relative error below 1.2e-7.
static inline vf exponential(vf x) {
    const float magic = 12582912.0f;           // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
    const vf t = x * 1.44269504088896341f + magic, n = t - magic;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.38367945e-3f);              // of least relative error, 2e-9, where |r| < log(2) / 2
    p = p * r + 8.37485679e-3f;
    p = p * r + 4.16682288e-2f;
    p = p * r + 1.66664198e-1f;
    p = p * r + 4.99999911e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const vf e = (vf)((vi)p + ((vi)t << 23));
    return x < FLOOR ? vf{} : e;
}

// Rows become columns.
static inline void turn(vf (&a)[LANES]) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for (int step = 0; step < 4; step++) {     // each lets row i and row i + LANES / 2 alternate
        vf b[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = (vf)_mm512_permutex2var_ps((__m512)a[i], low, (__m512)a[i + LANES / 2]);
            b[2 * i + 1] = (vf)_mm512_permutex2var_ps((__m512)a[i], high, (__m512)a[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
#else
    vf b[LANES];
    for (int i = 0; i < LANES; i++)
        for (int l = 0; l < LANES; l++) b[i][l] = a[l][i];
    for (int i = 0; i < LANES; i++) a[i] = b[i];
#endif
}

// Rows [count][d], `step` numbers apart, become columns [d][rows] times a factor; rows from `count` on are zeros.
static inline void pack(const float *from, int64_t step, int64_t count, int64_t d, float factor, int64_t rows, float *to) {
    for (int64_t l = 0; l < rows; l += LANES)
        for (int64_t c = 0; c < d; c += LANES) {
            const int64_t n = std::min<int64_t>(LANES, d - c);
            vf a[LANES] = {};
            for (int64_t i = 0; i < LANES && l + i < count; i++) {
                const float *row = from + (l + i) * step + c;
                n == LANES ? std::memcpy(&a[i], row, sizeof(vf)) : std::memcpy(&a[i], row, 4 * n);
            }
            turn(a);
            for (int64_t i = 0; i < n; i++) *(vf *)(to + (c + i) * rows + l) = a[i] * factor;
        }
}

template <class T> static T *aligned(std::vector<T> &v, size_t n) {
    if (v.size() < n + 16) v.resize(n + 16);
    auto address = reinterpret_cast<uintptr_t>(v.data());
    return reinterpret_cast<T *>((address + 63) & ~uintptr_t(63));
}

// What threads share: the tasks that are left of those from `next` on.
struct Tasks {
    std::atomic<int64_t> next;
    int64_t last;
    std::atomic<int> failed{0};
};

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

// Call work(data) in so many threads. `parallel` is libgomp's GOMP_parallel, or null for threads of our own.
static void in_threads(void (*work)(void *), void *data, int64_t threads, Parallel parallel) {
    if (threads <= 1) {
        work(data);
    } else if (parallel) {
        parallel(work, data, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; i++) others.emplace_back(work, data);
        work(data);
        for (auto &other : others) other.join();
    }
}
