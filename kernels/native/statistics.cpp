// Statistics of softmax attention in one pass over the keys, for the CPU. Compiled behind vectors.hpp.
//
// A strip of queries lies in the lanes of vector registers. For a few keys at a time the scores of the strip are
// computed in registers, turned into weights, and added to everything that was asked for, so that neither scores nor
// weights ever reach memory. Row statistics need no sums across lanes; column sums keep one partial sum per lane.

constexpr int KEYS = 6;                        // keys at a time: KEYS x VECTORS scores fill the registers
constexpr int STRIP = LANES * VECTORS;         // queries at a time, at most 64
constexpr int GROUP = 8 * KEYS;                // keys whose weights are held at once, in the first-level cache

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));

enum Flag : int64_t {
    ONLINE = 1, ENTROPY = 2, SQUARES = 4, PEAK = 8, DISTANCE = 16, TARGETS = 32, MEMBER = 64, INDUCTION = 128,
    RECEIVED = 256, TOP = 512, POOLED = 1024,
};

struct Job {
    // [batch, head, position, d] with the last dimension contiguous; strides in numbers
    const float *q, *k;
    int64_t q_batch, q_head, q_row, k_batch, k_head, k_row;
    int64_t batch, heads, kv_heads, n_queries, n_keys, d;
    float scale, softcap;                      // softcap 0: none
    const float *lse;                          // [batch, head, query]; not read when ONLINE
    const float *sinks;                        // [head] logits that join the denominator when ONLINE; null for none
    int64_t causal, offset, window;            // window 0: none
    const uint8_t *mask;                       // nonzero: may see; null for none
    const float *bias;                         // added to scores, hides at or below `bias_hidden`; null for none
    int64_t mask_batch, mask_head, mask_row, mask_key;  // strides of either, 0 where it is broadcast
    float bias_hidden;
    const float *key_bias;                     // [batch, head, key]; null for none
    // Block-sparse layout: for each layout and strip, runs of keys; a run has its words or sees everything (-1).
    int64_t n_layouts;                         // 0: none
    const int64_t *run_of;                     // [layout, strip + 1]
    const int32_t *run_start, *run_stop;
    const int64_t *run_word;
    const uint64_t *words;                     // bit l: lane l sees the key
    int64_t flags;
    int64_t n_targets;
    const int32_t *targets;                    // [target, batch, head, query]
    const float *member;                       // [key]
    const int32_t *tokens;                     // [batch, 1 + key]: the token that each key follows, and its own
    int64_t n_top, pool;
    int64_t threads, segments;
    int64_t first_task, last_task;             // which (segment, batch, head) this call sees to
    // results; [batch, head, query] unless said otherwise
    float *lse_out, *entropy, *squares, *peak;
    int32_t *peak_key;
    float *distance, *distance_var;
    float *at_target;                          // [target, batch, head, query]
    float *on_member, *induction;
    double *received;                          // [segment, batch, head, key]
    float *top_weight;                         // [batch, head, query, n]
    int32_t *top_key;
    float *pool_sum, *pool_max;                // [batch, head, query block, key block]
};

// One bit per lane of a comparison.
static inline uint32_t bits(vi m) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)m, (__m512i)m);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)m));
#else
    uint32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= uint32_t(m[i] & 1) << i;
    return found;
#endif
}

// The numbers one place on, with `in` in front.
static inline v8f shifted(v8f a, v8f in) {
#if defined(__clang__)
    return __builtin_shufflevector(a, in, 8, 0, 1, 2, 3, 4, 5, 6);
#else
    return __builtin_shuffle(a, in, v8i{8, 0, 1, 2, 3, 4, 5, 6});
#endif
}
static inline v8i shifted(v8i a, v8i in) { return (v8i)shifted((v8f)a, (v8f)in); }

static inline vf tangent(vf x) {               // tanh; exact enough near 0 through the odd series
    vf clipped = max(-(max(-x, splat(-15.0f))), splat(-15.0f));
    vf e = exponential(clipped * 2.0f);
    vf far = 1.0f - 2.0f / (e + 1.0f);
    vf s = x * x;
    vf near = x * (1.0f + s * (-0.33333333f + s * (0.13333333f + s * (-0.05396825f + s * 0.02186949f))));
    return s < 0.04f ? near : far;
}

// Everything that one strip of queries collects.
struct Strip {
    alignas(64) float lead[STRIP];             // what is taken from scores before exp: the lse, or the largest so far
    alignas(64) float mass[STRIP], entropy[STRIP], squares[STRIP], peak[STRIP], member[STRIP], induction[STRIP];
    alignas(64) int32_t peak_key[STRIP], position[STRIP], token[STRIP];
    alignas(64) double mass_total[STRIP], entropy_total[STRIP], squares_total[STRIP], first[STRIP], second[STRIP];
    alignas(64) float threshold[STRIP];        // the smallest of the top keys
};

struct Scratch {
    std::vector<float> packed, columns, target_sum, pool_sum, pool_max, bias, top_weight;
    std::vector<int32_t> target, top_key;
    std::vector<int32_t> target_low, target_high;
    std::vector<uint64_t> words;
};

// Scores of KEYS keys and one strip, zeros in its first `hidden` vectors; `rows` points at the keys, `packed` is
// [d][STRIP].
template <int HIDE = 0>
static inline void products(int64_t hidden, const float *packed, const float *const rows[KEYS], int64_t d, float scale,
                            vf (*out)[VECTORS]) {
    if constexpr (HIDE + 1 < VECTORS)
        if (hidden > HIDE) return products<HIDE + 1>(hidden, packed, rows, d, scale, out);
    vf acc[KEYS][VECTORS] = {};
    for (int64_t c = 0; c < d; c++) {
        vf q[VECTORS];
        for (int v = HIDE; v < VECTORS; v++) q[v] = *(const vf *)(packed + c * STRIP + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < KEYS; r++) {
            vf key = splat(rows[r][c]);
#pragma GCC unroll 4
            for (int v = HIDE; v < VECTORS; v++) acc[r][v] += q[v] * key;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < KEYS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) out[r][v] = acc[r][v] * scale;
}

class Worker {
  public:
    explicit Worker(const Job &job) : job(job) {}

    void segment(int64_t b, int64_t h, int64_t s) {
        this->b = b, this->h = h;
        group = b * job.heads + h;
        const int64_t n_strips = (job.n_queries + STRIP - 1) / STRIP;
        // Strips of one segment lie together, and cuts between segments fall on edges of pooled blocks.
        int64_t unit = 1;
        if (job.flags & POOLED) while ((unit * STRIP) % job.pool) unit++;
        const int64_t units = (n_strips + unit - 1) / unit;
        const int64_t from = units * s / job.segments * unit;
        const int64_t to = std::min(n_strips, units * (s + 1) / job.segments * unit);
        if (job.flags & RECEIVED) {
            columns = aligned(scratch.columns, job.n_keys * LANES);
            std::memset(columns, 0, sizeof(float) * job.n_keys * LANES);
        }
        for (int64_t strip = from; strip < to; strip++) run(strip);
        if (job.flags & RECEIVED) {
            double *out = job.received + (s * job.batch * job.heads + group) * job.n_keys;
            for (int64_t j = 0; j < job.n_keys; j++) {
                double sum[LANES];
                for (int l = 0; l < LANES; l++) sum[l] = columns[j * LANES + l];
                for (int n = LANES / 2; n; n /= 2)
                    for (int l = 0; l < n; l++) sum[l] += sum[l + n];
                out[j] = sum[0];
            }
        }
    }

  private:
    const Job &job;
    Scratch scratch;
    Strip st;
    int64_t b = 0, h = 0, group = 0, start = 0, count = 0;
    float *columns = nullptr, *packed = nullptr, *target_sum = nullptr, *bias = nullptr;
    float *pool_sum = nullptr, *pool_max = nullptr;
    int32_t *target = nullptr;
    const float *keys = nullptr, *key_bias = nullptr;
    int64_t pool_blocks = 0, top_stride = 0;
    static constexpr int SOME = 12;            // keys after which the threshold is read again
    float weight_of[(SOME + 1) * LANES];
    int32_t lane_of[(SOME + 1) * LANES], key_of[(SOME + 1) * LANES];
    float *top_weight = nullptr;
    int32_t *top_key = nullptr;
    const int32_t *tokens = nullptr;           // of this batch entry
    vf p[GROUP][VECTORS], group_mass[VECTORS];  // [key][vector]: scores, then weights

    void run(int64_t strip) {
        start = strip * STRIP;
        count = std::min<int64_t>(STRIP, job.n_queries - start);
        begin();
        const int64_t low = start + job.offset, high = start + count - 1 + job.offset;
        int64_t first = 0, last = job.n_keys;
        if (job.causal) last = std::min(last, high + 1);
        if (job.window) {
            first = std::max(first, low - job.window + 1);
            last = std::min(last, high + job.window);
        }
        if (job.n_layouts) {
            const int64_t n_strips = (job.n_queries + STRIP - 1) / STRIP;
            const int64_t layout = h / (job.heads / job.n_layouts);
            const int64_t *of = job.run_of + layout * (n_strips + 1) + strip;
            for (int64_t i = of[0]; i < of[1]; i++) {
                const int64_t a = std::max<int64_t>(first, job.run_start[i]), z = std::min<int64_t>(last, job.run_stop[i]);
                const uint64_t *words = job.run_word[i] < 0 ? nullptr : job.words + job.run_word[i] - job.run_start[i];
                sweep(a, z, words);
            }
        } else if (job.mask) {
            sweep(first, last, mask_words(first, last));
        } else {
            sweep(first, last, nullptr);
        }
        finish();
    }

    void begin() {
        const float *q = job.q + b * job.q_batch + h * job.q_head + start * job.q_row;
        packed = aligned(scratch.packed, job.d * STRIP);
        pack(q, job.q_row, count, job.d, 1.0f, STRIP, packed);
        keys = job.k + b * job.k_batch + h / (job.heads / job.kv_heads) * job.k_head;
        key_bias = job.key_bias ? job.key_bias + group * job.n_keys : nullptr;
        tokens = job.flags & INDUCTION ? job.tokens + b * (1 + job.n_keys) : nullptr;
        for (int64_t l = 0; l < STRIP; l++) {
            const bool real = l < count;
            const float empty = job.sinks ? job.sinks[h] : EMPTY;
            st.lead[l] = job.flags & ONLINE ? empty : real ? job.lse[group * job.n_queries + start + l] : -HIDDEN;
            st.mass[l] = st.entropy[l] = st.squares[l] = st.member[l] = st.induction[l] = 0;
            st.mass_total[l] = st.entropy_total[l] = st.squares_total[l] = st.first[l] = st.second[l] = 0;
            st.peak[l] = 0, st.peak_key[l] = -1, st.threshold[l] = 0;
            st.position[l] = int32_t(start + l + job.offset);
            st.token[l] = tokens && real ? tokens[1 + start + l + job.offset] : -1;
        }
        if (job.flags & TARGETS) {
            target = aligned(scratch.target, job.n_targets * STRIP);
            target_sum = aligned(scratch.target_sum, job.n_targets * STRIP);
            scratch.target_low.assign(job.n_targets, INT32_MAX);
            scratch.target_high.assign(job.n_targets, -1);
            for (int64_t t = 0; t < job.n_targets; t++)
                for (int64_t l = 0; l < STRIP; l++) {
                    const int32_t at = l < count ? job.targets[(t * job.batch * job.heads + group) * job.n_queries + start + l] : -1;
                    target[t * STRIP + l] = at, target_sum[t * STRIP + l] = 0;
                    if (at < 0) continue;
                    scratch.target_low[t] = std::min(scratch.target_low[t], at);
                    scratch.target_high[t] = std::max(scratch.target_high[t], at);
                }
        }
        if (job.flags & TOP) {
            top_stride = (job.n_top + 7) / 8 * 8;
            top_weight = aligned(scratch.top_weight, STRIP * top_stride);
            top_key = aligned(scratch.top_key, STRIP * top_stride);
            std::fill_n(top_weight, STRIP * top_stride, 0.0f);
            std::fill_n(top_key, STRIP * top_stride, -1);
        }
        if (job.flags & POOLED) {
            pool_blocks = (job.n_keys + job.pool - 1) / job.pool;
            pool_sum = aligned(scratch.pool_sum, pool_blocks * STRIP);
            pool_max = aligned(scratch.pool_max, pool_blocks * STRIP);
            std::memset(pool_sum, 0, sizeof(float) * pool_blocks * STRIP);
            std::memset(pool_max, 0, sizeof(float) * pool_blocks * STRIP);
        }
        if (job.bias) bias = aligned(scratch.bias, GROUP * STRIP);
    }

    // One word per key from a boolean mask: bit l says whether lane l sees it.
    const uint64_t *mask_words(int64_t first, int64_t last) {
        if (last <= first) return nullptr;
        if (int64_t(scratch.words.size()) < job.n_keys) scratch.words.resize(job.n_keys);
        uint64_t *words = scratch.words.data();
        const uint8_t *m = job.mask + b * job.mask_batch + h * job.mask_head + start * job.mask_row;
        std::memset(words + first, 0, sizeof(uint64_t) * (last - first));
        for (int64_t l = 0; l < count; l++) {
            const uint8_t *row = m + l * job.mask_row;
            if (job.mask_key == 1)
                for (int64_t j = first; j < last; j++) words[j] |= uint64_t(row[j] != 0) << l;
            else
                for (int64_t j = first; j < last; j++) words[j] |= uint64_t(row[j * job.mask_key] != 0) << l;
        }
        return words;
    }

    void sweep(int64_t first, int64_t last, const uint64_t *words) {
        for (int64_t j = first, moved = 0; j < last; j += GROUP, moved++) {
            keys_at(j, int(std::min<int64_t>(GROUP, last - j)), words);
            if (moved % 4 == 3) move_sums();
        }
        move_sums();
    }

    // A group of up to GROUP keys from j on: scores, weights, and everything that is collected of them.
    void keys_at(int64_t j, int n, const uint64_t *words) {
        uint64_t seen = 0;
        if (words) {
            for (int r = 0; r < n; r++) seen |= words[j + r];
            if (!seen) return;
        }
        for (int r = 0; r < n; r += KEYS) {
            const float *rows[KEYS];
            for (int i = 0; i < KEYS; i++) rows[i] = keys + (j + std::min(r + i, n - 1)) * job.k_row;
            const int64_t hidden = job.causal ? (j + r - start - job.offset) / LANES : 0;  // from key j + r on
            products(hidden, packed, rows, job.d, job.scale, p + r);
        }
        shape(j, n, words);
        if (job.flags & ONLINE) lead(n);
        job.flags & SQUARES ? weights<true>(j, n) : weights<false>(j, n);
        if (job.flags & (PEAK | TOP)) for (int v = 0; v < VECTORS; v++) largest(j, n, v);
        if (job.flags & DISTANCE) distance(j, n);
        if (job.flags & TARGETS) at_targets(j, n);
        if (job.flags & MEMBER)
            for (int r = 0; r < n; r++)
                if (job.member[j + r] != 0)
                    for (int v = 0; v < VECTORS; v++) *(vf *)(st.member + v * LANES) += p[r][v];
        if (job.flags & INDUCTION) induction(j, n);
        if (job.flags & POOLED) pool_keys(j, n);
    }

    // Scores become weights, in place, and are added up: two vectors at a time, for which the registers suffice.
    template <bool SQUARED> void weights(int64_t j, int n) {
        for (int first = 0; first < VECTORS; first += 2) {
            vf *column = job.flags & RECEIVED ? (vf *)(columns + j * LANES) : nullptr;
            const vf *lead = (const vf *)(st.lead + first * LANES);
            vf mass[2] = {}, entropy[2] = {}, squares[2] = {};
            const vf leads[2] = {lead[0], lead[1]};
            for (int r = 0; r < n; r++) {
                vf weight[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    const vf x = p[r][first + i] - leads[i];
                    p[r][first + i] = weight[i] = exponential(x);
                    mass[i] += weight[i];
                    entropy[i] = x < FLOOR ? entropy[i] : entropy[i] + weight[i] * x;  // x is -inf where products overflow
                    if (SQUARED) squares[i] += weight[i] * weight[i];
                }
                if (column) column[r] += weight[0] + weight[1];
            }
            for (int i = 0, v = first; i < 2; i++, v++) {
                group_mass[v] = mass[i];
                *(vf *)(st.mass + v * LANES) += mass[i];
                *(vf *)(st.entropy + v * LANES) += entropy[i];
                *(vf *)(st.squares + v * LANES) += squares[i];
            }
        }
    }

    // Softcap, biases and masks, in place; hidden scores become HIDDEN.
    void shape(int64_t j, int n, const uint64_t *words) {
        vf (*s)[VECTORS] = p;
        if (job.softcap > 0)
            for (int r = 0; r < n; r++)
                for (int v = 0; v < VECTORS; v++) s[r][v] = tangent(s[r][v] / job.softcap) * job.softcap;
        if (key_bias)
            for (int r = 0; r < n; r++)
                for (int v = 0; v < VECTORS; v++) s[r][v] += key_bias[j + r];
        if (job.bias) {
            const float *from = job.bias + b * job.mask_batch + h * job.mask_head + start * job.mask_row;
            for (int64_t l = 0; l < STRIP; l++)
                for (int r = 0; r < n; r++)
                    bias[r * STRIP + l] = l < count ? from[l * job.mask_row + (j + r) * job.mask_key] : 0.0f;
            for (int r = 0; r < n; r++)
                for (int v = 0; v < VECTORS; v++) {
                    const vf add = *(vf *)(bias + r * STRIP + v * LANES);
                    s[r][v] = add <= job.bias_hidden ? splat(HIDDEN) : s[r][v] + add;
                }
        }
        const int64_t low = start + job.offset, high = start + count - 1 + job.offset;
        if (job.causal && j + n - 1 > low)
            for (int r = 0; r < n; r++)
                for (int v = 0; v < VECTORS; v++)
                    s[r][v] = *(vi *)(st.position + v * LANES) < int32_t(j + r) ? splat(HIDDEN) : s[r][v];
        if (job.window && (high - j >= job.window || j + n - 1 - low >= job.window))
            for (int r = 0; r < n; r++)
                for (int v = 0; v < VECTORS; v++) {
                    const vi away = *(vi *)(st.position + v * LANES) - int32_t(j + r);
                    const int32_t w = int32_t(job.window);
                    s[r][v] = ((away >= w) | (away <= -w)) ? splat(HIDDEN) : s[r][v];
                }
        if (words)
            for (int r = 0; r < n; r++) {
                if (words[j + r] == ~uint64_t(0)) continue;
                for (int v = 0; v < VECTORS; v++) {
                    vi lane;
                    for (int l = 0; l < LANES; l++) lane[l] = 1 << l;
                    const vi bits = splat_int(int32_t(words[j + r] >> (v * LANES) & ((1u << LANES) - 1)));
                    s[r][v] = (bits & lane) == 0 ? splat(HIDDEN) : s[r][v];
                }
            }
    }

    // Raise the lead of lanes that meet a larger score, and put what they have collected on the new scale.
    void lead(int n) {
        for (int v = 0; v < VECTORS; v++) {
            vf top = p[0][v];
            for (int r = 1; r < n; r++) top = max(top, p[r][v]);
            const vf old = *(vf *)(st.lead + v * LANES);
            const vi more = top > old;
            if (!any(more)) continue;
            const vf now = more ? top : old;
            const vf less = max(old - now, splat(-200.0f));  // EMPTY before: nothing was collected yet
            const vf factor = exponential(less);
            *(vf *)(st.lead + v * LANES) = now;
            vf *mass = (vf *)(st.mass + v * LANES), *entropy = (vf *)(st.entropy + v * LANES);
            *entropy = (*entropy + less * *mass) * factor;
            *mass *= factor;
            *(vf *)(st.squares + v * LANES) *= factor * factor;
            *(vf *)(st.peak + v * LANES) *= factor;
            *(vf *)(st.member + v * LANES) *= factor;
            *(vf *)(st.induction + v * LANES) *= factor;
            *(vf *)(st.threshold + v * LANES) *= factor;
            for (int l = 0; l < LANES; l++) {
                const int at = v * LANES + l;
                if (!more[l]) continue;
                const double f = factor[l];
                st.entropy_total[at] = (st.entropy_total[at] + double(less[l]) * st.mass_total[at]) * f;
                st.mass_total[at] *= f, st.squares_total[at] *= f * f;
                st.first[at] *= f, st.second[at] *= f;
                if (job.flags & TARGETS)
                    for (int64_t t = 0; t < job.n_targets; t++) target_sum[t * STRIP + at] *= factor[l];
                if (job.flags & TOP)
                    for (int64_t i = 0; i < job.n_top; i++) top_weight[at * top_stride + i] *= factor[l];
            }
        }
    }

    void largest(int64_t j, int n, int v) {
        vf top = p[0][v];
        for (int r = 1; r < n; r++) top = max(top, p[r][v]);
        vf *best = (vf *)(st.peak + v * LANES);
        const vi better = top > *best;
        if (any(better)) {
            vi key = *(vi *)(st.peak_key + v * LANES);
            for (int r = n - 1; r >= 0; r--) key = (better & (p[r][v] == top)) ? splat_int(int32_t(j + r)) : key;
            *(vi *)(st.peak_key + v * LANES) = key;
            *best = better ? top : *best;
        }
        const vf *threshold = (const vf *)(st.threshold + v * LANES);
        if (!(job.flags & TOP) || !any(top > *threshold)) return;
        for (int r = 0; r < n; r += SOME) {
            const int found = candidates(r, std::min(n, r + SOME), v, *threshold);
            for (int i = 0; i < found; i++) insert(v * LANES + lane_of[i], weight_of[i], int32_t(j) + key_of[i]);
        }
    }

    // Weights above the threshold: a list first, since a branch at every weight would be mispredicted again and again.
    int candidates(int from, int to, int v, vf threshold) {
        int found = 0;
#if defined(__AVX512F__)
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int r = from; r < to; r++) {
            const __m512 weight = (__m512)p[r][v];
            const __mmask16 hit = _mm512_cmp_ps_mask(weight, (__m512)threshold, _CMP_GT_OQ);
            _mm512_storeu_ps(weight_of + found, _mm512_maskz_compress_ps(hit, weight));
            _mm512_storeu_si512(lane_of + found, _mm512_maskz_compress_epi32(hit, lanes));
            _mm512_storeu_si512(key_of + found, _mm512_set1_epi32(r));
            found += __builtin_popcount(hit);
        }
#else
        for (int r = from; r < to; r++)
            for (uint32_t hit = bits(p[r][v] > threshold); hit; hit &= hit - 1, found++) {
                const int l = __builtin_ctz(hit);
                lane_of[found] = l, key_of[found] = r, weight_of[found] = ((const float *)&p[r][v])[l];
            }
#endif
        return found;
    }

    // Into a sorted list, largest first; of equal weights the earlier key stands first. Eight places at a time: a place
    // keeps its weight, or takes the new one, or the one before it.
    void insert(int lane, float weight, int32_t key) {
        float *w = top_weight + lane * top_stride;
        int32_t *k = top_key + lane * top_stride;
        for (int64_t at = top_stride - 8; at >= 0; at -= 8) {
            const v8f here = *(const v8f *)(w + at), before = shifted(here, v8f{} + (at ? w[at - 1] : INFINITY));
            const v8i key_here = *(const v8i *)(k + at), key_before = shifted(key_here, v8i{} + (at ? k[at - 1] : 0));
            const v8i shift = weight > before, take = weight > here;
            *(v8f *)(w + at) = shift ? before : take ? v8f{} + weight : here;
            *(v8i *)(k + at) = shift ? key_before : take ? v8i{} + key : key_here;
        }
        st.threshold[lane] = w[job.n_top - 1];
    }

    // First and second moments of |i - j|: around the mean of these few keys in single precision, then in double.
    void distance(int64_t j, int n) {
        const int64_t low = start + job.offset, high = start + count - 1 + job.offset;
        const bool before = job.causal || j + n - 1 <= low, straddles = !before && j < high;
        const float direction = before ? -1.0f : 1.0f;
        for (int v = 0; v < VECTORS; v++) {
            const vi away = *(vi *)(st.position + v * LANES) - int32_t(j);
            const vf base = __builtin_convertvector(away < 0 ? -away : away, vf);
            vf sum = vf{}, spread = vf{}, mean;
            const vf mass = max(group_mass[v], splat(1e-37f));
            if (straddles) {
                for (int r = 0; r < n; r++) sum += p[r][v] * (far(away - r) - base);
                mean = sum / mass;
                for (int r = 0; r < n; r++) {
                    const vf off = far(away - r) - base - mean;
                    spread += p[r][v] * (off * off);
                }
            } else {
                for (int r = 0; r < n; r++) sum += p[r][v] * (direction * float(r));
                mean = sum / mass;
                for (int r = 0; r < n; r++) {
                    const vf off = direction * float(r) - mean;
                    spread += p[r][v] * (off * off);
                }
            }
            double *first = st.first + v * LANES, *second = st.second + v * LANES;
            const float *weight = (const float *)&group_mass[v], *from = (const float *)&base;
            const float *step = (const float *)&mean, *around = (const float *)&spread;
            for (int l = 0; l < LANES; l++) {
                const double at = double(from[l]) + double(step[l]);
                first[l] += weight[l] * at;
                second[l] += around[l] + weight[l] * at * at;
            }
        }
    }

    static vf far(vi away) { return __builtin_convertvector(away < 0 ? -away : away, vf); }

    void at_targets(int64_t j, int n) {
        for (int64_t t = 0; t < job.n_targets; t++) {
            const int64_t from = std::max<int64_t>(scratch.target_low[t] - j, 0);
            const int64_t to = std::min<int64_t>(scratch.target_high[t] - j, n - 1);
            for (int64_t r = from; r <= to; r++)
                for (int v = 0; v < VECTORS; v++) {
                    const vi here = *(vi *)(target + t * STRIP + v * LANES) == int32_t(j + r);
                    *(vf *)(target_sum + t * STRIP + v * LANES) += here ? p[r][v] : vf{};
                }
        }
    }

    void induction(int64_t j, int n) {
        for (int v = 0; v < VECTORS; v++) {
            const vi token = *(vi *)(st.token + v * LANES), row = *(vi *)(st.position + v * LANES);
            vf sum = vf{};
            for (int r = 0; r < n; r++) sum += (token == tokens[j + r]) & (row >= int32_t(j + r)) ? p[r][v] : vf{};
            *(vf *)(st.induction + v * LANES) += sum;
        }
    }

    void pool_keys(int64_t j, int n) {
        for (int v = 0; v < VECTORS; v++)
            for (int r = 0; r < n;) {
                const int64_t block = (j + r) / job.pool;
                const int stop = int(std::min<int64_t>(n, (block + 1) * job.pool - j));
                vf *sum = (vf *)(pool_sum + block * STRIP + v * LANES), *top = (vf *)(pool_max + block * STRIP + v * LANES);
                vf total = *sum, most = *top;
                for (; r < stop; r++) total += p[r][v], most = max(most, p[r][v]);
                *sum = total, *top = most;
            }
    }

    void move_sums() {
        for (int l = 0; l < STRIP; l++) {
            st.mass_total[l] += st.mass[l], st.entropy_total[l] += st.entropy[l], st.squares_total[l] += st.squares[l];
            st.mass[l] = st.entropy[l] = st.squares[l] = 0;
        }
    }

    void finish() {
        const int64_t row = group * job.n_queries + start, all = job.batch * job.heads * job.n_queries;
        const bool online = job.flags & ONLINE;
        for (int64_t l = 0; l < count; l++) {
            const double mass = st.mass_total[l], sink = job.sinks ? std::exp(double(job.sinks[h]) - st.lead[l]) : 0.0;
            const double total = online ? mass + sink : 1.0, unit = 1 / total, log_total = online ? std::log(total) : 0.0;
            if (online) job.lse_out[row + l] = float(st.lead[l] + log_total);
            if (job.flags & ENTROPY) {
                const double nats = (log_total * mass - st.entropy_total[l]) * unit;
                job.entropy[row + l] = float(nats < 0 ? 0.0 : nats);  // below zero by rounding alone
            }
            if (job.flags & SQUARES) job.squares[row + l] = float(st.squares_total[l] * unit * unit);
            if (job.flags & PEAK) job.peak[row + l] = float(st.peak[l] * unit), job.peak_key[row + l] = st.peak_key[l];
            if (job.flags & DISTANCE) {
                const double mean = st.first[l] / mass, var = st.second[l] / mass - mean * mean;
                job.distance[row + l] = float(mean), job.distance_var[row + l] = float(var > 0 ? var : 0.0);
            }
            if (job.flags & TARGETS)
                for (int64_t t = 0; t < job.n_targets; t++)
                    job.at_target[t * all + row + l] = float(target_sum[t * STRIP + l] * unit);
            if (job.flags & MEMBER) job.on_member[row + l] = float(st.member[l] * unit);
            if (job.flags & INDUCTION) job.induction[row + l] = float(st.induction[l] * unit);
            if (job.flags & TOP)
                for (int64_t i = 0; i < job.n_top; i++) {
                    job.top_weight[(row + l) * job.n_top + i] = float(top_weight[l * top_stride + i] * unit);
                    job.top_key[(row + l) * job.n_top + i] = top_key[l * top_stride + i];
                }
        }
        if (job.flags & POOLED) pool();
    }

    // The lanes of each block of queries together, four at a time.
    void pool() {
        const int64_t n_rows = (job.n_queries + job.pool - 1) / job.pool;
        for (int64_t k = 0; k < pool_blocks; k++) {
            const float *mass = pool_sum + k * STRIP, *most = pool_max + k * STRIP;
            for (int64_t l = 0; l < count;) {
                const int64_t row = (start + l) / job.pool, stop = std::min(count, (row + 1) * job.pool - start);
                float sum[4] = {}, top[4] = {};
                for (; l + 4 <= stop; l += 4)
                    for (int i = 0; i < 4; i++) sum[i] += mass[l + i], top[i] = std::max(top[i], most[l + i]);
                for (; l < stop; l++) sum[0] += mass[l], top[0] = std::max(top[0], most[l]);
                const int64_t at = (group * n_rows + row) * pool_blocks + k;
                job.pool_sum[at] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
                const float largest = std::max(std::max(top[0], top[1]), std::max(top[2], top[3]));
                job.pool_max[at] = std::max(job.pool_max[at], largest);
            }
        }
    }
};

struct Shared {
    const Job *job;
    Tasks tasks;
};

static void work(void *data) {
    auto *shared = static_cast<Shared *>(data);
    const Job &job = *shared->job;
    const int64_t groups = job.batch * job.heads;
    try {
        Worker *worker = new (std::align_val_t(64)) Worker(job);
        for (int64_t t; (t = shared->tasks.next.fetch_add(1)) < shared->tasks.last;) {
            const int64_t g = t % groups, s = job.segments - 1 - t / groups;  // later queries see more: they go first
            worker->segment(g / job.heads, g % job.heads, s);
        }
        worker->~Worker();
        ::operator delete(worker, std::align_val_t(64));
    } catch (...) {
        shared->tasks.failed = 1;
    }
}

extern "C" {
int64_t workbench_strip() { return STRIP; }
int64_t workbench_job_bytes() { return sizeof(Job); }

// `parallel` as in `in_threads`. Returns 0, or 1 where memory ran out.
int workbench_statistics(const Job *job, Parallel parallel) {
    Shared shared;
    shared.job = job;
    shared.tasks.next = job->first_task, shared.tasks.last = job->last_task;
    in_threads(work, &shared, std::min(job->threads, job->last_task - job->first_task), parallel);
    return shared.tasks.failed;
}
}
