// A Llama-like decoder, forward and backward, on one core. metapeft/kernels/decoder.py fills these structures.
//
// Rows are tokens. Sequences lie one after another without padding; the first `common` rows, if any, are what all the
// others begin with, computed once. Every sequence attends to the prefix (keys and values that are given), to the common
// rows and, causally, to its own rows. Matrices are row-major float32. The order of every sum depends on the sizes
// alone: the same inputs give the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "products.h"

namespace {

typedef void (*Gemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };

struct Linear {  // y = x W^T + bias + scale * (dropout(x) A^T * e) B^T
  const float *weight, *bias;  // (outputs, inputs); (outputs) or null
  const float *a, *e, *b;      // (rank, inputs); (rank) or null; (outputs, rank)
  float *da, *de, *db;         // gradients, of the same shapes
  int32_t inputs, outputs, rank, index;
  float scale, dropout;
};

struct Layer {
  Linear linear[LINEARS];
  const float *norm_attention, *norm_mlp, *norm_q, *norm_k;  // the last two may be null
  const float *cosine, *sine;                                // (positions, rotary / 2)
  const float *prefix_keys, *prefix_values;                  // (kv_heads, prefix, head_width)
  float *prefix_keys_gradient, *prefix_values_gradient;      // the same shape, or null
  float *keys, *values;  // recorded: (kv_heads, prefix + rows, head_width), or null
};

struct Model {
  const Layer *layers;
  const float *norm, *head;  // (width), (vocabulary, width)
  Gemm gemm;
  int32_t width, inner, heads, kv_heads, head_width, rotary, traditional, vocabulary;
  float epsilon;
};

struct Batch {
  const int32_t *ends;              // (sequences): the row after each sequence's last
  float *hidden;                    // (rows, width): in, the input of layer `start`; out, the output of `stop` - 1
  float *hidden_gradient;           // (rows, width) or null: by that input
  const int32_t *chosen, *targets;  // (count): rows that predict, and what they should
  const int32_t *roots;             // (root_count): tokens whose log-likelihood is asked for
  float *loss, *hit, *root_scores;  // (count), (count), (count, root_count)
  uint64_t seed;                    // of dropout
  int32_t rows, sequences, common, prefix, start, stop, count, root_count, train, checkpoint, gated;
  float weight;                     // of each loss in the gradient
  float gate;                       // added to the logits of the prefix's first `gated` tokens
};

constexpr int ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112;
constexpr int BLOCK = 64;  // rows of logits at a time

inline float exponential(float x) {  // 2^(x / ln 2): a Taylor series around the nearest whole number
  x = x < -87.0f ? -87.0f : x;  // this way round, NaN stays what it is
  x = x > 88.0f ? 88.0f : x;
  const float y = x * 1.44269504f, n = __builtin_rintf(y), f = y - n;
  float p = 1.52527338e-5f;
  p = p * f + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

float inverse_rms(const float *x, int width, float epsilon) {
  float sum = 0;
  for (int i = 0; i < width; i++) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / width + epsilon);
}

void rms_norm(const float *x, const float *weight, float *y, size_t rows, int width, float epsilon) {
  for (size_t r = 0; r < rows; r++, x += width, y += width) {
    const float scale = inverse_rms(x, width, epsilon);
    for (int i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
  }
}

// dx = (0 or dx) + the gradient by x. dx may be dy.
void rms_norm_back(const float *x, const float *weight, const float *dy, float *dx, bool add, size_t rows, int width,
                   float epsilon) {
  for (size_t r = 0; r < rows; r++, x += width, dy += width, dx += width) {
    const float scale = inverse_rms(x, width, epsilon);
    float dot = 0;
    for (int i = 0; i < width; i++) dot += dy[i] * weight[i] * x[i];
    const float slope = scale * scale * scale * dot / width;
    for (int i = 0; i < width; i++) dx[i] = (add ? dx[i] : 0.0f) + dy[i] * weight[i] * scale - x[i] * slope;
  }
}

// y = (0 or y) + x * mask / (1 - p). The mask is a hash (splitmix64) of seed, layer and place: both passes find the same.
void drop(const float *x, float *y, bool add, size_t count, float p, uint64_t seed, int index) {
  const uint64_t golden = 0x9E3779B97F4A7C15ull, key = (seed + 1) * golden ^ (index + 1) * 0xD1B54A32D192ED03ull;
  const uint32_t threshold = (uint32_t)(p * 4294967295.0);
  const float scale = 1 / (1 - p);
  for (size_t i = 0; i < count; i++) {
    uint64_t z = key + i * golden;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    const float kept = (uint32_t)(z >> 32) >= threshold ? x[i] * scale : 0.0f;
    y[i] = (add ? y[i] : 0.0f) + kept;
  }
}

void swiglu(const float *gate, const float *up, float *y, size_t count) {
  for (size_t i = 0; i < count; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

// d_up holds dy when this begins.
void swiglu_back(const float *gate, const float *up, float *d_gate, float *d_up, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const float sigmoid = 1 / (1 + exponential(-gate[i])), silu = gate[i] * sigmoid, dy = d_up[i];
    d_gate[i] = dy * up[i] * (sigmoid + silu * (1 - sigmoid));
    d_up[i] = dy * silu;
  }
}

struct Arena {  // parts of one block of memory; without a block it only counts
  float *memory;
  size_t used = 0;
  float *take(size_t count) {
    float *found = memory ? memory + used : nullptr;
    used += (count + 15) / 16 * 16;
    return found;
  }
};

struct Saved {                       // by one layer's forward pass for its backward pass
  float *q, *k, *v;                  // by head: see `split`
  float *raw_q, *raw_k;              // before norm_q and norm_k
  float *attended, *middle, *gate, *up;
  float *t[LINEARS];                 // x A^T
};

class Decoder {
 public:
  Decoder(const Model &model, const Batch &batch, float *memory) : m(model), b(batch), arena{memory} {
    rows = b.rows;
    group = m.heads / m.kv_heads;
    q_width = m.heads * m.head_width;
    kv_width = m.kv_heads * m.head_width;
    size_t most = 0;
    for (int s = 0; s < b.sequences; s++) most = std::max(most, (size_t)length(s) * (context(s) + length(s)));
    int dropped_width = 0;
    for (int i = b.start; i < b.stop; i++)
      for (const Linear &l : m.layers[i].linear) {
        rank = std::max(rank, l.rank);
        if (b.train && l.dropout > 0) dropped_width = std::max(dropped_width, l.inputs);
        if (m.layers[i].norm_q) norms = true;
      }
    inputs = take(m.width, b.train ? b.stop - b.start : 1);
    first = arena.used;
    Arena one{nullptr};
    place(one);
    stride = one.used;
    arena.used += stride * (b.train && !b.checkpoint ? b.stop - b.start : 1);
    normed = take(m.width);
    product = take(std::max(m.inner, q_width));
    row_q = take(q_width), row_k = take(kv_width), row_v = take(kv_width), head_o = take(q_width);
    scores = arena.take(group * most);
    small = take(rank);
    dropped = take(dropped_width);
#ifdef METAPEFT_LANES
    const int widest = std::max({m.inner, q_width, m.width});
    packed = arena.take(std::max(products::packed_size(rows, widest), products::packed_size(BLOCK, m.width)));
    packed_low = arena.take(products::packed_size(rows, rank));
#endif
    const size_t block = std::min(BLOCK, b.count);
    logits = arena.take(block * m.vocabulary);
    chosen = arena.take(block * m.width), chosen_normed = arena.take(block * m.width);
    if (b.train) {
      gradient = take(m.width), d_normed = take(m.width);
      d_gate = take(m.inner), d_up = take(m.inner);
      d_scores = arena.take(group * most);
      d_q = take(q_width);
      d_k = arena.take((size_t)(b.prefix + rows) * kv_width), d_v = arena.take((size_t)(b.prefix + rows) * kv_width);
    }
  }

  size_t size() const { return arena.used; }

  void run() {
    const size_t bytes = sizeof(float) * rows * m.width;
    const int depth = b.stop - b.start;
    float *in = b.hidden;
    for (int i = 0; i < depth; i++) {
      float *out;
      if (b.train) {  // the inputs of all layers are kept
        if (i == 0) std::memcpy(in = input(0), b.hidden, bytes);
        out = i + 1 < depth ? input(i + 1) : b.hidden;
      } else {
        out = in == b.hidden ? inputs : b.hidden;
      }
      forward(i, in, out);
      in = out;
    }
    if (in != b.hidden) std::memcpy(b.hidden, in, bytes);
    if (b.train) std::memset(gradient, 0, bytes);
    for (int begin = 0; begin < b.count; begin += BLOCK) predict(begin, std::min(BLOCK, b.count - begin));
    if (!b.train) return;
    for (int i = depth - 1; i >= 0; i--) {
      if (b.checkpoint) forward(i, input(i), d_normed);
      backward(i);
    }
    if (b.hidden_gradient) std::memcpy(b.hidden_gradient, gradient, bytes);
  }

 private:
  const Model &m;
  const Batch &b;
  Arena arena;
  int rows, group, q_width, kv_width, rank = 0;
  bool norms = false;
  size_t first, stride;
  float *inputs, *normed, *product, *row_q, *row_k, *row_v, *head_o, *scores, *small, *dropped;
  float *packed = nullptr, *packed_low = nullptr;  // x and t as products.h wants them
  float *logits, *chosen, *chosen_normed;
  float *gradient, *d_normed, *d_gate, *d_up, *d_scores, *d_q, *d_k, *d_v;

  float *take(int width, size_t times = 1) { return arena.take((size_t)rows * width * times); }
  float *input(int i) { return inputs + (size_t)i * rows * m.width; }
  int offset(int s) const { return s ? b.ends[s - 1] : 0; }
  int length(int s) const { return b.ends[s] - offset(s); }
  int context(int s) const { return b.prefix + (b.common && s ? b.common : 0); }

  Saved place(Arena &from) const {
    const size_t n = rows;
    Saved s;
    s.q = from.take(n * q_width);
    s.k = from.take((b.prefix + n) * kv_width), s.v = from.take((b.prefix + n) * kv_width);
    s.raw_q = norms ? from.take(n * q_width) : nullptr, s.raw_k = norms ? from.take(n * kv_width) : nullptr;
    s.attended = from.take(n * q_width), s.middle = from.take(n * m.width);
    s.gate = from.take(n * m.inner), s.up = from.take(n * m.inner);
    for (float *&t : s.t) t = from.take(n * rank);
    return s;
  }

  Saved saved(int i) const {
    Arena part{arena.memory + first + (b.train && !b.checkpoint ? i * stride : 0)};
    return place(part);
  }

  // Products. Leading dimensions are those of whole matrices unless given.

  void times_transposed(int n, int outputs, int inner, float alpha, const float *x, int ldx, const float *w, int ldw,
                        float beta, float *y, int ldy) const {
    m.gemm(ROW_MAJOR, PLAIN, TRANSPOSED, n, outputs, inner, alpha, x, ldx, w, ldw, beta, y, ldy);
  }
  void times(int n, int outputs, int inner, float alpha, const float *x, int ldx, const float *w, int ldw, float beta,
             float *y, int ldy) const {
    m.gemm(ROW_MAJOR, PLAIN, PLAIN, n, outputs, inner, alpha, x, ldx, w, ldw, beta, y, ldy);
  }
  void transposed_times(int n, int outputs, int inner, float alpha, const float *x, int ldx, const float *w, int ldw,
                        float beta, float *y, int ldy) const {
    m.gemm(ROW_MAJOR, TRANSPOSED, PLAIN, n, outputs, inner, alpha, x, ldx, w, ldw, beta, y, ldy);
  }

  const float *dropout(const Linear &l, const float *x) const {
    if (!b.train || l.dropout <= 0) return x;
    drop(x, dropped, false, (size_t)rows * l.inputs, l.dropout, b.seed, l.index);
    return dropped;
  }

  // t * e * scale, in `small`.
  const float *scaled(const Linear &l, const float *t) const {
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < l.rank; i++) small[r * l.rank + i] = t[r * l.rank + i] * l.scale * (l.e ? l.e[i] : 1.0f);
    return small;
  }

  // y = (0 or y) + linear(x); t is filled for the backward pass. again: x is what the call before had.
  void apply(const Linear &l, const float *x, float *y, bool add, float *t, bool again = false) const {
    if (l.bias)
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < l.outputs; i++)
          y[(size_t)r * l.outputs + i] = (add ? y[(size_t)r * l.outputs + i] : 0.0f) + l.bias[i];
    add = add || l.bias;
#ifdef METAPEFT_LANES
    if (!again) products::pack(x, rows, l.inputs, packed);
    if (l.rank) {
      if (b.train && l.dropout > 0)
        times_transposed(rows, l.rank, l.inputs, 1, dropout(l, x), l.inputs, l.a, l.inputs, 0, t, l.rank);
      else
        products::forward(packed, rows, l.inputs, l.a, l.rank, {nullptr, nullptr, 0}, t, false);
      products::pack(scaled(l, t), rows, l.rank, packed_low);
    }
    products::forward(packed, rows, l.inputs, l.weight, l.outputs, {l.b, packed_low, l.rank}, y, add);
#else
    (void)again;
    times_transposed(rows, l.outputs, l.inputs, 1, x, l.inputs, l.weight, l.inputs, add, y, l.outputs);
    if (!l.rank) return;
    times_transposed(rows, l.rank, l.inputs, 1, dropout(l, x), l.inputs, l.a, l.inputs, 0, t, l.rank);
    times_transposed(rows, l.outputs, l.rank, 1, scaled(l, t), l.rank, l.b, l.rank, 1, y, l.outputs);
#endif
  }

  // dx = (0 or dx) + the gradient by x, unless dx is null; the gradients of A, e and B.
  void apply_back(const Linear &l, const float *x, const float *dy, float *dx, bool add, float *t) const {
    if (l.rank) {
      transposed_times(l.outputs, l.rank, rows, 1, dy, l.outputs, scaled(l, t), l.rank, 0, l.db, l.rank);
      times(rows, l.rank, l.outputs, l.scale, dy, l.outputs, l.b, l.rank, 0, small, l.rank);
      if (l.e) {
        for (int i = 0; i < l.rank; i++) l.de[i] = 0;
        for (int r = 0; r < rows; r++)
          for (int i = 0; i < l.rank; i++) {
            float &d = small[r * l.rank + i];
            l.de[i] += d * t[r * l.rank + i];
            d *= l.e[i];
          }
      }
      transposed_times(l.rank, l.inputs, rows, 1, small, l.rank, dropout(l, x), l.inputs, 0, l.da, l.inputs);
    }
    if (!dx) return;
    times_weight(dy, rows, l.outputs, l.weight, l.inputs, l.dropout > 0 ? 0 : l.rank, l.a, dx, add);
    if (l.rank && l.dropout > 0) {
      times(rows, l.inputs, l.rank, 1, small, l.rank, l.a, l.inputs, 0, dropped, l.inputs);
      drop(dropped, dx, true, (size_t)rows * l.inputs, l.dropout, b.seed, l.index);
    }
  }

  // dx = (0 or dx) + dy W + small A
  void times_weight(const float *dy, int n, int outputs, const float *weight, int width, int low, const float *a,
                    float *dx, bool add) const {
#ifdef METAPEFT_LANES
    if (width % METAPEFT_LANES == 0) return products::backward(dy, n, outputs, weight, width, {small, a, low}, dx, add);
#endif
    times(n, width, outputs, 1, dy, outputs, weight, width, add, dx, width);
    if (low) times(n, width, low, 1, small, low, a, width, 1, dx, width);
  }

  // Rotates one head's row by its position; `back` turns the other way (and transposes a scaled rotation).
  void rotate(const Layer &layer, const float *x, float *y, int position, bool back) const {
    const int half = m.rotary / 2;
    const float *cosine = layer.cosine + (size_t)position * half, *sine = layer.sine + (size_t)position * half;
    const float sign = back ? -1.0f : 1.0f;
    if (m.traditional)
      for (int i = 0; i < half; i++) {
        const float u = x[2 * i], v = x[2 * i + 1], s = sign * sine[i];
        y[2 * i] = u * cosine[i] - v * s, y[2 * i + 1] = u * s + v * cosine[i];
      }
    else
      for (int i = 0; i < half; i++) {
        const float u = x[i], v = x[half + i], s = sign * sine[i];
        y[i] = u * cosine[i] - v * s, y[half + i] = u * s + v * cosine[i];
      }
    for (int i = m.rotary; i < m.head_width; i++) y[i] = x[i];
  }

  // Queries lie as (kv_head, sequence, head of the group, token): one product serves a group. Keys and values lie as
  // (kv_head, prefix and rows), so that what sequences share lies before them.
  float *query(float *q, int kv, int s, int head, int token) const {
    return q + ((size_t)kv * rows * group + (size_t)offset(s) * group + (size_t)head * length(s) + token) * m.head_width;
  }
  float *key(float *k, int kv, int row) const {  // row -prefix is the prefix's first
    return k + ((size_t)kv * (b.prefix + rows) + b.prefix + row) * m.head_width;
  }

  template <typename Call>  // call(row, by row, by head, position) for every query
  void each_query(float *by_row, float *by_head, Call call) const {
    for (int kv = 0; kv < m.kv_heads; kv++)
      for (int s = 0; s < b.sequences; s++)
        for (int h = 0; h < group; h++)
          for (int i = 0; i < length(s); i++)
            call(by_row + (size_t)(offset(s) + i) * q_width + (kv * group + h) * m.head_width,
                 query(by_head, kv, s, h, i), context(s) + i);
  }
  template <typename Call>
  void each_key(float *by_row, float *by_head, Call call) const {
    for (int kv = 0; kv < m.kv_heads; kv++)
      for (int s = 0; s < b.sequences; s++)
        for (int i = 0; i < length(s); i++)
          call(by_row + (size_t)(offset(s) + i) * kv_width + kv * m.head_width, key(by_head, kv, offset(s) + i),
               context(s) + i);
  }

  // Attention probabilities of a sequence's queries in one group of heads, (group * length, context + length).
  void attend(const Saved &a, int kv, int s) const {
    const int n = length(s), before = context(s), all = before + n, d = m.head_width;
    const float scale = 1 / std::sqrt((float)d);
    const float *q = query(a.q, kv, s, 0, 0);
    if (before) times_transposed(group * n, before, d, scale, q, d, key(a.k, kv, -b.prefix), d, 0, scores, all);
    times_transposed(group * n, n, d, scale, q, d, key(a.k, kv, offset(s)), d, 0, scores + before, all);
    for (int r = 0; r < group * n; r++) {
      float *row = scores + (size_t)r * all, most = -INFINITY, sum = 0;
      for (int i = 0; i < b.gated; i++) row[i] += b.gate;
      const int seen = before + r % n + 1;
      for (int i = 0; i < seen; i++) most = row[i] > most ? row[i] : most;
      for (int i = 0; i < seen; i++) sum += row[i] = exponential(row[i] - most);
      const float share = 1 / sum;
      for (int i = 0; i < seen; i++) row[i] *= share;
      for (int i = seen; i < all; i++) row[i] = 0;
    }
  }

  void forward(int i, const float *in, float *out) const {
    const Layer &layer = m.layers[b.start + i];
    const Linear *linear = layer.linear;
    const Saved a = saved(i);
    const int d = m.head_width;
    rms_norm(in, layer.norm_attention, normed, rows, m.width, m.epsilon);
    apply(linear[Q], normed, row_q, false, a.t[Q]);
    apply(linear[K], normed, row_k, false, a.t[K], true);
    apply(linear[V], normed, row_v, false, a.t[V], true);
    if (layer.norm_q) {
      std::memcpy(a.raw_q, row_q, sizeof(float) * rows * q_width);
      std::memcpy(a.raw_k, row_k, sizeof(float) * rows * kv_width);
      rms_norm(row_q, layer.norm_q, row_q, (size_t)rows * m.heads, d, m.epsilon);
      rms_norm(row_k, layer.norm_k, row_k, (size_t)rows * m.kv_heads, d, m.epsilon);
    }
    each_query(row_q, a.q, [&](float *row, float *head, int position) { rotate(layer, row, head, position, false); });
    each_key(row_k, a.k, [&](float *row, float *head, int position) { rotate(layer, row, head, position, false); });
    each_key(row_v, a.v, [&](float *row, float *head, int) { std::copy(row, row + d, head); });
    for (int kv = 0; kv < m.kv_heads && b.prefix; kv++) {
      const size_t size = (size_t)b.prefix * d;
      std::copy_n(layer.prefix_keys + kv * size, size, key(a.k, kv, -b.prefix));
      std::copy_n(layer.prefix_values + kv * size, size, key(a.v, kv, -b.prefix));
    }
    if (layer.keys) std::copy_n(a.k, (size_t)(b.prefix + rows) * kv_width, layer.keys);
    if (layer.values) std::copy_n(a.v, (size_t)(b.prefix + rows) * kv_width, layer.values);
    for (int kv = 0; kv < m.kv_heads; kv++)
      for (int s = 0; s < b.sequences; s++) {
        const int n = length(s), before = context(s), all = before + n;
        float *o = query(head_o, kv, s, 0, 0);
        attend(a, kv, s);
        if (before) times(group * n, d, before, 1, scores, all, key(a.v, kv, -b.prefix), d, 0, o, d);
        times(group * n, d, n, 1, scores + before, all, key(a.v, kv, offset(s)), d, before ? 1 : 0, o, d);
      }
    each_query(a.attended, head_o, [&](float *row, float *head, int) { std::copy(head, head + d, row); });
    std::copy_n(in, (size_t)rows * m.width, a.middle);
    apply(linear[O], a.attended, a.middle, true, a.t[O]);
    rms_norm(a.middle, layer.norm_mlp, normed, rows, m.width, m.epsilon);
    apply(linear[GATE], normed, a.gate, false, a.t[GATE]);
    apply(linear[UP], normed, a.up, false, a.t[UP], true);
    swiglu(a.gate, a.up, product, (size_t)rows * m.inner);
    std::copy_n(a.middle, (size_t)rows * m.width, out);
    apply(linear[DOWN], product, out, true, a.t[DOWN]);
  }

  void backward(int i) const {
    const Layer &layer = m.layers[b.start + i];
    const Linear *linear = layer.linear;
    const Saved a = saved(i);
    const int d = m.head_width;
    const bool below = i > 0 || b.hidden_gradient;  // whether anything wants the gradient by this layer's input
    if (linear[DOWN].rank) swiglu(a.gate, a.up, product, (size_t)rows * m.inner);
    apply_back(linear[DOWN], product, gradient, d_up, false, a.t[DOWN]);
    swiglu_back(a.gate, a.up, d_gate, d_up, (size_t)rows * m.inner);
    rms_norm(a.middle, layer.norm_mlp, normed, rows, m.width, m.epsilon);
    apply_back(linear[GATE], normed, d_gate, d_normed, false, a.t[GATE]);
    apply_back(linear[UP], normed, d_up, d_normed, true, a.t[UP]);
    rms_norm_back(a.middle, layer.norm_mlp, d_normed, gradient, true, rows, m.width, m.epsilon);

    apply_back(linear[O], a.attended, gradient, row_q, false, a.t[O]);
    each_query(row_q, head_o, [&](float *row, float *head, int) { std::copy(row, row + d, head); });
    std::fill_n(d_k, (size_t)(b.prefix + rows) * kv_width, 0.0f);
    std::fill_n(d_v, (size_t)(b.prefix + rows) * kv_width, 0.0f);
    for (int kv = 0; kv < m.kv_heads; kv++)
      for (int s = 0; s < b.sequences; s++) attend_back(a, kv, s);
    each_query(row_q, d_q, [&](float *row, float *head, int position) { rotate(layer, head, row, position, true); });
    each_key(row_k, d_k, [&](float *row, float *head, int position) { rotate(layer, head, row, position, true); });
    each_key(row_v, d_v, [&](float *row, float *head, int) { std::copy(head, head + d, row); });
    for (int kv = 0; kv < m.kv_heads && layer.prefix_keys_gradient; kv++) {
      const size_t size = (size_t)b.prefix * d;
      std::copy_n(key(d_k, kv, -b.prefix), size, layer.prefix_keys_gradient + kv * size);
      std::copy_n(key(d_v, kv, -b.prefix), size, layer.prefix_values_gradient + kv * size);
    }
    if (layer.norm_q) {
      rms_norm_back(a.raw_q, layer.norm_q, row_q, row_q, false, (size_t)rows * m.heads, d, m.epsilon);
      rms_norm_back(a.raw_k, layer.norm_k, row_k, row_k, false, (size_t)rows * m.kv_heads, d, m.epsilon);
    }
    const float *in = inputs + (size_t)i * rows * m.width;
    rms_norm(in, layer.norm_attention, normed, rows, m.width, m.epsilon);
    apply_back(linear[Q], normed, row_q, below ? d_normed : nullptr, false, a.t[Q]);
    apply_back(linear[K], normed, row_k, below ? d_normed : nullptr, true, a.t[K]);
    apply_back(linear[V], normed, row_v, below ? d_normed : nullptr, true, a.t[V]);
    if (below) rms_norm_back(in, layer.norm_attention, d_normed, gradient, true, rows, m.width, m.epsilon);
  }

  void attend_back(const Saved &a, int kv, int s) const {
    const int n = length(s), before = context(s), all = before + n, d = m.head_width, queries = group * n;
    const float scale = 1 / std::sqrt((float)d);
    const float *q = query(a.q, kv, s, 0, 0), *d_o = query(head_o, kv, s, 0, 0);
    float *dq = query(d_q, kv, s, 0, 0);
    attend(a, kv, s);
    // Twice: what came before, and the sequence's own rows.
    for (int own = before ? 0 : 1; own < 2; own++) {
      const int row = own ? offset(s) : -b.prefix, width = own ? n : before, at = own ? before : 0;
      transposed_times(width, d, queries, 1, scores + at, all, d_o, d, 1, key(d_v, kv, row), d);
      times_transposed(queries, width, d, 1, d_o, d, key(a.v, kv, row), d, 0, d_scores + at, all);
    }
    for (int r = 0; r < queries; r++) {
      const float *p = scores + (size_t)r * all;
      float *dp = d_scores + (size_t)r * all, dot = 0;
      for (int i = 0; i < all; i++) dot += p[i] * dp[i];
      for (int i = 0; i < all; i++) dp[i] = p[i] * (dp[i] - dot) * scale;
    }
    for (int own = before ? 0 : 1; own < 2; own++) {
      const int row = own ? offset(s) : -b.prefix, width = own ? n : before, at = own ? before : 0;
      times(queries, d, width, 1, d_scores + at, all, key(a.k, kv, row), d, own && before ? 1 : 0, dq, d);
      transposed_times(width, d, queries, 1, d_scores + at, all, q, d, 1, key(d_k, kv, row), d);
    }
  }

  // Losses of the chosen rows [begin, begin + count), and in training their gradient by the last hidden state.
  void predict(int begin, int count) const {
    const int width = m.width, vocabulary = m.vocabulary;
    for (int r = 0; r < count; r++)
      std::copy_n(b.hidden + (size_t)b.chosen[begin + r] * width, width, chosen + (size_t)r * width);
    rms_norm(chosen, m.norm, chosen_normed, count, width, m.epsilon);
#ifdef METAPEFT_LANES
    products::pack(chosen_normed, count, width, packed);
    products::forward(packed, count, width, m.head, vocabulary, {nullptr, nullptr, 0}, logits, false);
#else
    times_transposed(count, vocabulary, width, 1, chosen_normed, width, m.head, width, 0, logits, vocabulary);
#endif
    for (int r = 0; r < count; r++) {
      float *row = logits + (size_t)r * vocabulary, most = -INFINITY, sum = 0;
      const int target = b.targets[begin + r];
      for (int i = 0; i < vocabulary; i++) most = row[i] > most ? row[i] : most;
      const float gold = row[target];
      if (b.train)
        for (int i = 0; i < vocabulary; i++) sum += row[i] = exponential(row[i] - most);
      else
        for (int i = 0; i < vocabulary; i++) sum += exponential(row[i] - most);
      const float total = most + std::log(sum);
      b.loss[begin + r] = total - gold;
      b.hit[begin + r] = gold == most;
      if (b.train) {
        const float share = b.weight / sum;
        for (int i = 0; i < vocabulary; i++) row[i] *= share;
        row[target] -= b.weight;
      } else {
        for (int i = 0; i < b.root_count; i++) b.root_scores[(size_t)(begin + r) * b.root_count + i] = row[b.roots[i]] - total;
      }
    }
    if (!b.train) return;
    times_weight(logits, count, vocabulary, m.head, width, 0, nullptr, chosen_normed, false);
    rms_norm_back(chosen, m.norm, chosen_normed, chosen_normed, false, count, width, m.epsilon);
    for (int r = 0; r < count; r++) {
      float *to = gradient + (size_t)b.chosen[begin + r] * width;
      for (int i = 0; i < width; i++) to[i] += chosen_normed[(size_t)r * width + i];
    }
  }
};

}  // namespace

extern "C" {

size_t metapeft_decoder_size(const Model *model, const Batch *batch) {  // floats of memory that a run needs
  return Decoder(*model, *batch, nullptr).size();
}

void metapeft_decoder_run(const Model *model, const Batch *batch, float *memory) { Decoder(*model, *batch, memory).run(); }
}
