// Attention of a mixed batch over the paged cache.
//
// A row's keys are cut into spans of SPAN positions, counted from position 0. For each span the
// scores of all queries of a group are made, then the softmax relative to the span's own maximum,
// then the weighted sum of values; spans are joined in order, each scaled by e^(its maximum - the
// joint one). So a query's result depends neither on the chunk it came in, nor on the rows beside
// it, nor on who computes it. Products are made in float, probabilities are not rounded.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "product.h"

namespace forebay {

// As in forebay_kernels.cpu.library. Strides are in elements.
struct AttentionArgs {
    const void *query;  // [tokens, heads, dim]
    int64_t query_stride;
    void *out;  // [tokens, heads, dim]
    int64_t out_stride;
    const void *keys;    // [kv_heads, pages, block_size, dim]
    const void *values;  // [kv_heads, pages, block_size, dim]
    const int32_t *tables;  // [rows, table_stride]
    int64_t table_stride;
    const int64_t *starts;   // [rows + 1]
    const int64_t *lengths;  // [rows]
    int64_t rows, heads, kv_heads, dim, pages, block_size;
    int64_t window;  // 0: none
    float scale;
    float softcap;  // 0: none
};

constexpr long SPAN = 256;
constexpr long GROUP_ROWS = 48;  // query rows that share the packing of keys
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// The sums of some query rows over some keys: highest score, sum of e^(score - highest), and the
// values weighted by those.
struct Partial {
    std::vector<float> highest, total, values;

    void clear(long rows, long width) {
        highest.assign(size_t(rows), NOTHING);
        total.assign(size_t(rows), 0.0f);
        values.assign(size_t(rows * width), 0.0f);
    }
};

struct AttentionScratch {
    std::vector<float> query, scores;
    std::vector<char> panel;
    std::vector<const char *> slots;  // of the span's values
    std::vector<char> empty;          // a slot that holds nothing
    Partial span, joined;
};

INLINE float exponential(float x) { return exponential(splat(x))[0]; }

// into = into joined with next, in this order; a span that a row does not see changes nothing.
inline void join(Partial &into, const Partial &next, long rows, long width) {
    for (long r = 0; r < rows; r++) {
        if (next.total[size_t(r)] == 0.0f) continue;
        float &highest = into.highest[size_t(r)], &total = into.total[size_t(r)];
        float both = std::max(highest, next.highest[size_t(r)]);
        float old = exponential(highest - both), fresh = exponential(next.highest[size_t(r)] - both);
        highest = both;
        total = total * old + next.total[size_t(r)] * fresh;
        float *a = &into.values[size_t(r * width)];
        const float *b = &next.values[size_t(r * width)];
        for (long d = 0; d < width; d += LANES) write(a + d, read(a + d) * old + read(b + d) * fresh);
    }
}

template <class Kind>
struct ScoreTile {
    const float *query;
    long query_width;
    const char *panel;
    long steps;
    float *scores;  // [rows, SPAN] from the panel's first column

    template <int ROWS>
    INLINE void run(long first) {
        F32 sums[ROWS][WIDE] = {};
        multiply<Kind, ROWS>(sums, query + first * query_width, query_width, panel, steps);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < WIDE; j++) store(scores + (first + i) * SPAN + j * LANES, sums[i][j]);
    }
};

// values[r, d] = sum over slots of weight[r, slot] * value[slot, d], for 32 columns d.
template <class T>
struct ValueTile {
    const float *weights;  // [rows, SPAN]
    const char *const *slots;
    long count, column, dim;
    float *values;
    long width;

    template <int ROWS>
    INLINE void run(long first) {
        F32 sums[ROWS][WIDE] = {};
        bool both = column + PANEL <= dim;
        for (long s = 0; s < count; s++) {
            const T *value = reinterpret_cast<const T *>(slots[s]) + column;
            F32 v[WIDE];
            if (both)
                for (int j = 0; j < WIDE; j++) v[j] = read(value + j * LANES);
            else
                for (int j = 0; j < WIDE; j++) {
                    long left = dim - column - j * LANES;
                    v[j] = left > 0 ? read(value + j * LANES, left) : F32{};
                }
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < WIDE; j++) sums[i][j] += v[j] * weights[(first + i) * SPAN + s];
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < WIDE; j++)
                store(values + (first + i) * width + column + j * LANES, sums[i][j]);
    }
};

template <class Kind>
class Attention {
    using T = typename Kind::Element;

  public:
    explicit Attention(const AttentionArgs &args)
        : a(args), group(args.heads / args.kv_heads), width(ceil_div(args.dim, PANEL) * PANEL) {}

    void run() {
        cut();
        static std::vector<AttentionScratch> scratches(Pool::MOST_THREADS);
        static std::vector<Partial> partials;
        if (long(partials.size()) < num_partials) partials.resize(size_t(num_partials));
        shared(long(items.size()), [&](long part, int thread) {
            compute(items[size_t(part)], scratches[size_t(thread)], partials);
        });
        if (!num_partials) return;
        shared(long(items.size()), [&](long part, int thread) {
            const Item &item = items[size_t(part)];
            if (item.partial < 0 || item.first_span != span_of(low_of(item.row, item.first))) return;
            Partial &joined = scratches[size_t(thread)].joined;
            joined.clear(group, width);
            long spans = ceil_div(a.lengths[item.row], SPAN) - item.first_span;
            for (long s = 0; s < spans; s++)
                join(joined, partials[size_t(item.partial + s)], group, width);
            finish(item, joined);
        });
    }

  private:
    struct Item {
        long row, head;      // of keys and values
        long first, count;   // queries of the row
        long first_span, end_span;
        long partial;  // where its sums go; -1: it has all spans
    };

    static long span_of(long position) { return position / SPAN; }
    long queries(long row) const { return a.starts[row + 1] - a.starts[row]; }
    long position(long row, long query) const { return a.lengths[row] - queries(row) + query; }
    long low_of(long row, long query) const {
        long low = a.window ? position(row, query) - a.window + 1 : 0;
        return low < 0 ? 0 : low;
    }

    // Chunks go to one thread for each run of queries, long decode rows to one for each span.
    void cut() {
        long most = GROUP_ROWS / group > 1 ? GROUP_ROWS / group : 1;
        for (long row = 0; row < a.rows; row++)
            for (long head = 0; head < a.kv_heads; head++)
                for (long first = 0, n = queries(row); first < n; first += most) {
                    long count = n - first < most ? n - first : most;
                    long from = span_of(low_of(row, first));
                    long to = ceil_div(position(row, first + count - 1) + 1, SPAN);
                    if (n > 1 || to - from <= 1) {
                        items.push_back({row, head, first, count, from, to, -1});
                        continue;
                    }
                    for (long span = from; span < to; span++)
                        items.push_back({row, head, first, count, span, span + 1, num_partials++});
                }
    }

    void compute(const Item &item, AttentionScratch &s, std::vector<Partial> &partials) {
        long rows = item.count * group;
        s.query.resize(size_t(rows * a.dim));
        for (long r = 0; r < rows; r++) {
            const T *from = static_cast<const T *>(a.query) +
                            (a.starts[item.row] + item.first + r / group) * a.query_stride +
                            (item.head * group + r % group) * a.dim;
            float *to = &s.query[size_t(r * a.dim)];
            for (long d = 0; d < a.dim; d += LANES) write(to + d, read(from + d, a.dim - d), a.dim - d);
        }
        if (item.partial >= 0) {
            span(item, item.first_span, s, partials[size_t(item.partial)]);
            return;
        }
        s.joined.clear(rows, width);
        for (long n = item.first_span; n < item.end_span; n++) {
            span(item, n, s, s.span);
            join(s.joined, s.span, rows, width);
        }
        finish(item, s.joined);
    }

    const char *slot(const void *cache, long row, long head, long position) const {
        long page = a.tables[row * a.table_stride + position / a.block_size];
        long index = (head * a.pages + page) * a.block_size + position % a.block_size;
        return reinterpret_cast<const char *>(static_cast<const T *>(cache) + index * a.dim);
    }

    void span(const Item &item, long number, AttentionScratch &s, Partial &result) {
        long rows = item.count * group, start = number * SPAN;
        long low = std::max(start, low_of(item.row, item.first));
        long end = std::min(start + SPAN, position(item.row, item.first + item.count - 1) + 1);
        long first_panel = (low - start) / PANEL, panels = ceil_div(end - start, PANEL);
        long row_bytes = a.dim * long(sizeof(T));
        long steps = row_bytes / 4;
        s.scores.resize(size_t(rows * SPAN));
        s.panel.resize(size_t(steps * STEP) + AHEAD);
        s.empty.assign(size_t(row_bytes), 0);
        for (long p = first_panel; p < panels; p++) {
            const char *from[PANEL];
            for (long c = 0; c < PANEL; c++) {
                long at = start + p * PANEL + c;
                from[c] = at < low || at >= end ? s.empty.data() : slot(a.keys, item.row, item.head, at);
            }
            pack_panel(from, row_bytes, s.panel.data());
            by_tiles(rows, ScoreTile<Kind>{s.query.data(), a.dim, s.panel.data(), steps,
                                           s.scores.data() + p * PANEL});
        }
        result.highest.resize(size_t(rows));
        result.total.resize(size_t(rows));
        result.values.resize(size_t(rows * width));
        for (long r = 0; r < rows; r++)
            softmax(item, r, start, first_panel * PANEL, panels * PANEL, s.scores.data() + r * SPAN, result);
        s.slots.resize(size_t(end - low));
        for (long at = low; at < end; at++)
            s.slots[size_t(at - low)] = slot(a.values, item.row, item.head, at);
        for (long column = 0; column < a.dim; column += PANEL)
            by_tiles(rows, ValueTile<T>{s.scores.data() + (low - start), s.slots.data(), end - low,
                                        column, a.dim, result.values.data(), width});
    }

    // Scores of columns `begin .. end` to weights e^(score - highest); what is not seen to 0.
    void softmax(const Item &item, long r, long start, long begin, long end, float *scores,
                 Partial &result) const {
        long at = position(item.row, item.first + r / group);
        long low = low_of(item.row, item.first + r / group);
        F32 most = splat(NOTHING);
        I32 lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        for (long c = begin; c < end; c += LANES) {
            F32 score = read(scores + c) * a.scale;
            if (a.softcap > 0.0f) score = a.softcap * hyperbolic_tangent(score / a.softcap);
            I32 where = lane + int32_t(start + c);
            I32 seen = (where >= int32_t(low)) & (where <= int32_t(at));
            score = select(seen, score, splat(NOTHING));
            write(scores + c, score);
            most = maximum(most, score);
        }
        float highest = largest(most);
        result.highest[size_t(r)] = highest;
        F32 total{};
        for (long c = begin; c < end; c += LANES) {
            F32 weight = highest == NOTHING ? F32{} : exponential(read(scores + c) - highest);
            write(scores + c, weight);
            total += weight;
        }
        result.total[size_t(r)] = sum(total);
    }

    void finish(const Item &item, const Partial &joined) const {
        for (long r = 0; r < item.count * group; r++) {
            T *to = static_cast<T *>(a.out) +
                    (a.starts[item.row] + item.first + r / group) * a.out_stride +
                    (item.head * group + r % group) * a.dim;
            float total = joined.total[size_t(r)];
            float share = total == 0.0f ? 0.0f : 1.0f / total;
            const float *values = &joined.values[size_t(r * width)];
            for (long d = 0; d < a.dim; d += LANES)
                write(to + d, read(values + d) * share, a.dim - d);
        }
    }

    const AttentionArgs &a;
    const long group, width;
    std::vector<Item> items;
    long num_partials = 0;
};

}  // namespace forebay
