// Softmax attention over listed blocks of keys, for the CPU. Compiled behind vectors.hpp.
//
// A strip of queries of one block lies in the lanes of vector registers, and meets a few keys at a time: their scores,
// the weights on the scale of the largest score so far, and weights times values, which are kept turned round, [number]
// [query], until the strip is done. Keys and values are read where they lie.

namespace blocks {

struct Job {
    // [batch, head, position, number] with the last dimension contiguous; strides in numbers
    const float *q, *k, *v;
    int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
    int64_t batch, heads, kv_heads, n_queries, n_keys, d, width;
    float scale;
    int64_t causal, offset;                    // offset: the position of query 0
    int64_t block, n_layouts, n_rows;          // rows of blocks; the first has the position of query 0
    const int64_t *list_of;                    // [layout, row + 1]: where the list of a row begins
    const int32_t *listed;                     // blocks of keys
    int64_t threads, first_task, last_task;    // which (batch, head, row) this call sees to
    float *out, *lse;                          // [batch, query, head, width]; [batch, head, query]
};

constexpr int CHUNK = 64;                      // keys whose weights are held at once

// acc[i] += sum over t < n of a[t] times b[i][t * step]; `a` is [n][V * LANES].
template <int V, int K>
static inline void accumulate(const float *a, int64_t n, const float *const b[K], int64_t step, vf (&acc)[K][V]) {
    for (int64_t t = 0; t < n; t++) {
        vf x[V];
        for (int v = 0; v < V; v++) x[v] = *(const vf *)(a + (t * V + v) * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < K; i++) {
            const vf y = splat(b[i][t * step]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[i][v] += x[v] * y;
        }
    }
}

// V vectors of queries at a time.
template <int V> class Strip {
  public:
    static constexpr int ROWS = V * LANES;
    explicit Strip(const Job &job)
        : job(job), packed(aligned(packed_room, job.d * ROWS)), sums(aligned(sums_room, job.width * ROWS)) {}

    // Queries `first` to `first + count` of a head and the blocks of a list.
    void run(int64_t b, int64_t h, int64_t first, int64_t count, const int32_t *from, const int32_t *to) {
        const float *q = job.q + b * job.q_batch + h * job.q_head + first * job.q_row;
        const int64_t kv = h / (job.heads / job.kv_heads);
        keys = job.k + b * job.k_batch + kv * job.k_head;
        values = job.v + b * job.v_batch + kv * job.v_head;
        low = first + job.offset;
        pack(q, job.q_row, count, job.d, job.scale, ROWS, packed);
        std::memset(sums, 0, sizeof(float) * job.width * ROWS);
        for (int v = 0; v < V; v++) {
            lead[v] = splat(EMPTY), mass[v] = vf{};
            for (int l = 0; l < LANES; l++) position[v][l] = int32_t(low + v * LANES + l);
        }
        const int64_t last = job.causal ? std::min(job.n_keys, low + count) : job.n_keys;
        for (; from < to; from++)
            for (int64_t j = *from * job.block; j < std::min(last, (*from + 1) * job.block); j += CHUNK)
                meet(j, int(std::min<int64_t>(CHUNK, std::min(last, (*from + 1) * job.block) - j)));
        for (int64_t l = 0; l < count; l += LANES)
            for (int64_t w = 0; w < job.width; w += LANES) {
                const int64_t n = std::min<int64_t>(LANES, job.width - w);
                const vf total = mass[l / LANES];
                vf a[LANES] = {};
                for (int64_t i = 0; i < n; i++) {
                    const vf sum = *(vf *)(sums + (w + i) * ROWS + l);
                    a[i] = total == 0 ? vf{} : sum / total;
                }
                turn(a);
                for (int64_t i = 0; i < LANES && l + i < count; i++)
                    std::memcpy(job.out + ((b * job.n_queries + first + l + i) * job.heads + h) * job.width + w, &a[i], 4 * n);
            }
        const float *total = (const float *)mass, *top = (const float *)lead;
        for (int64_t l = 0; l < count; l++)
            job.lse[(b * job.heads + h) * job.n_queries + first + l] =
                total[l] == 0 ? -INFINITY : float(double(top[l]) + std::log(double(total[l])));
    }

  private:
    static constexpr int K = 6 * VECTORS / V;  // K x V sums fill the registers
    const Job &job;
    std::vector<float> packed_room, sums_room;
    float *packed, *sums;                      // queries [d][ROWS], weights times values so far [width][ROWS]
    const float *keys = nullptr, *values = nullptr;
    int64_t low = 0;
    vf p[CHUNK + K][V], lead[V], mass[V];
    vi position[V];

    // n keys from j on.
    void meet(int64_t j, int n) {
        for (int r = 0; r < n; r += K) {
            const float *rows[K];
            for (int i = 0; i < K; i++) rows[i] = keys + (j + std::min(r + i, n - 1)) * job.k_row;
            vf acc[K][V] = {};
            accumulate<V, K>(packed, job.d, rows, 1, acc);
            for (int i = 0; i < K; i++)
                for (int v = 0; v < V; v++) p[r + i][v] = acc[i][v];
        }
        if (job.causal && j + n - 1 > low)
            for (int r = 0; r < n; r++)
                for (int v = 0; v < V; v++) p[r][v] = position[v] < int32_t(j + r) ? splat(HIDDEN) : p[r][v];
        for (int v = 0; v < V; v++) {
            vf top = p[0][v];
            for (int r = 1; r < n; r++) top = max(p[r][v], top);
            const vi more = top > lead[v];
            if (any(more)) {
                const vf now = more ? top : lead[v], factor = exponential(max(lead[v] - now, splat(-200.0f)));
                lead[v] = now, mass[v] *= factor;
                for (int64_t w = 0; w < job.width; w++) *(vf *)(sums + w * ROWS + v * LANES) *= factor;
            }
            for (int r = 0; r < n; r++) {
                const vf x = p[r][v] - lead[v], weight = exponential(x);
                p[r][v] = x == x ? weight : x;  // what is no number stays none
                mass[v] += p[r][v];
            }
        }
        int64_t w = 0;
        for (; w + K <= job.width; w += K) add<K>(j, n, w);
        for (; w < job.width; w++) add<1>(j, n, w);
    }

    // The weights times numbers w to w + N of the values.
    template <int N> void add(int64_t j, int n, int64_t w) {
        const float *columns[N];
        vf acc[N][V];
        for (int i = 0; i < N; i++) {
            columns[i] = values + j * job.v_row + w + i;
            for (int v = 0; v < V; v++) acc[i][v] = *(vf *)(sums + (w + i) * ROWS + v * LANES);
        }
        accumulate<V, N>((const float *)p, n, columns, job.v_row, acc);
        for (int i = 0; i < N; i++)
            for (int v = 0; v < V; v++) *(vf *)(sums + (w + i) * ROWS + v * LANES) = acc[i][v];
    }
};

struct Shared {
    const Job *job;
    Tasks tasks;
};

template <int V> static void work(void *data) {
    auto *shared = static_cast<Shared *>(data);
    const Job &job = *shared->job;
    Strip<V> *strip = nullptr;
    try {
        strip = new (std::align_val_t(64)) Strip<V>(job);
    } catch (...) {
        shared->tasks.failed = 1;
        return;
    }
    for (int64_t t; (t = shared->tasks.next.fetch_add(1)) < shared->tasks.last;) {
        const int64_t group = t / job.n_rows, row = job.n_rows - 1 - t % job.n_rows, h = group % job.heads;
        const int64_t *of = job.list_of + h / (job.heads / job.n_layouts) * (job.n_rows + 1) + row;
        const int64_t edge = (job.offset / job.block + row) * job.block - job.offset;
        const int64_t stop = std::min(job.n_queries, edge + job.block);
        for (int64_t first = std::max<int64_t>(0, edge); first < stop; first += Strip<V>::ROWS)
            strip->run(group / job.heads, h, first, std::min<int64_t>(Strip<V>::ROWS, stop - first),
                       job.listed + of[0], job.listed + of[1]);
    }
    strip->~Strip<V>();
    ::operator delete(strip, std::align_val_t(64));
}

}  // namespace blocks

extern "C" {
int64_t workbench_blocks_bytes() { return sizeof(blocks::Job); }

// `parallel` as in `in_threads`. Returns 0, or 1 where memory ran out.
int workbench_blocks(const blocks::Job *job, Parallel parallel) {
    blocks::Shared shared;
    shared.job = job;
    shared.tasks.next = job->first_task, shared.tasks.last = job->last_task;
    void (*work)(void *) = blocks::work<VECTORS>;
#if defined(__AVX512F__)
    if (job->block <= LANES) work = blocks::work<1>;
    else if (job->block <= 2 * LANES) work = blocks::work<2>;
#endif
    in_threads(work, &shared, std::min(job->threads, job->last_task - job->first_task), parallel);
    return shared.tasks.failed;
}
}
