// Vectors of numbers for whatever processor this is compiled for, and work for several threads. Plain C++, no
// dependency. The other sources of this folder are compiled behind this one, as one library that ctypes loads.

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

static inline vf splat(float x) { return vf{} + x; }
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

// exp of numbers up to about 80; below FLOOR it is 0. Relative error below 2e-7.
static inline vf exponential(vf x) {
    const float magic = 12582912.0f;           // 1.5 * 2^23: adding it rounds to a whole number
    vf y = max(x, splat(FLOOR));
    vf t = y * 1.44269504088896341f + magic;
    vi whole = (vi)t - (vi)splat(magic);
    vf n = t - magic;
    vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf e = (vf)((vi)p + (whole << 23));
    return x < FLOOR ? vf{} : e;
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
