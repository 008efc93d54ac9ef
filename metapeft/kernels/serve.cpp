// One step of many sequences at once: every sequence reads its next tokens behind its own keys and values, with its own
// low-rank adapter, and the rows that ask for logits get them. metapeft/kernels/serve.py fills these structures.
//
// Rows are tokens, those of one sequence next to each other. Weights lie in strips of WIDTH outputs, input by input, in
// the narrowest type that holds them exactly: few rows cost what it takes to read the weights, and nothing else. All
// threads walk through the same program and share the items of each part. Every element is one sum in the order of the
// inner dimension: what a sequence computes does not depend on what is computed beside it, to the last bit.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "products.h"

#ifdef METAPEFT_LANES

#include <immintrin.h>

namespace {

using products::as_constant;
using products::each;
using products::LANES;
using products::load;
using products::store;
using products::Vector;

enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };
enum { FULL, HALF, BRAIN };  // float32, float16, bfloat16

constexpr int WIDTH = 2 * LANES;
constexpr int ROWS = LANES == 16 ? 12 : 6;  // at once: their sums stay in registers
constexpr int HEADS = 4;                    // likewise, of one group
constexpr int TOKENS = 8;                   // of one sequence in an item of attention

typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct Matrix {  // y = x W^T + bias
  const char *weight;
  const float *bias;  // (outputs) or null
  int32_t inputs, outputs, kind;
};

struct LowRank {  // y += (x A^T) B
  const float *a, *b;  // (rank, inputs), (rank, outputs)
  int32_t rank;
};

struct Layer {
  Matrix linear[LINEARS];
  const float *norm_attention, *norm_mlp, *norm_q, *norm_k;  // the last two may be null
  const float *cosine, *sine;                                // (positions, rotary / 2)
};

struct Model {
  const Layer *layers;
  const float *embedding, *norm;  // (vocabulary, width), (width)
  Matrix head;
  int32_t depth, width, inner, heads, kv_heads, head_width, rotary, traditional;
  float epsilon;
};

struct Sequence {
  const LowRank *adapter;  // (depth, LINEARS) or null
  float *cache;  // per layer keys (kv_heads, capacity / LANES, head_width, LANES), values (kv_heads, capacity, head_width)
  int32_t begin, count, known, capacity;  // rows [begin, begin + count), behind `known` tokens that are in the cache
};

struct Step {
  const Sequence *sequences;
  const int32_t *ids, *owners;  // (rows): the token, and its sequence
  const int32_t *chosen;        // (count): rows whose logits are wanted
  float *logits;                // (count, vocabulary)
  int32_t rows, sequence_count, count, rank;  // rank: the largest
};

inline Vector fill(float value) { return value - Vector{}; }

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float added(Vector v) {
  float lanes[LANES], sum = 0;
  store(lanes, v);
  for (float lane : lanes) sum += lane;
  return sum;
}

inline float largest(Vector v) {
  float lanes[LANES], most;
  store(lanes, v);
  most = lanes[0];
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}

inline Vector exponential(Vector x) {  // 2^(x / ln 2): a Taylor series around the nearest whole number
  x = larger(fill(-87.0f), x);  // this way round, NaN stays what it is
  x = x > fill(88.0f) ? fill(88.0f) : x;
  const Vector y = x * 1.44269504f, shifted = y + 12582912.0f, n = shifted - 12582912.0f, f = y - n;
  Vector p = fill(1.52527338e-5f);
  p = p * f + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * (Vector)power;
}

// The `at`-th vector of weights.
template <int KIND>
ALWAYS Vector weights(const char *from, size_t at) {
  if constexpr (KIND == FULL) return load((const float *)from + at * LANES);
#if METAPEFT_LANES == 16
  const __m256i halves = _mm256_loadu_si256((const __m256i *)from + at);
  if constexpr (KIND == HALF) return (Vector)_mm512_cvtph_ps(halves);
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  const __m128i halves = _mm_loadu_si128((const __m128i *)from + at);
  if constexpr (KIND == HALF) return (Vector)_mm256_cvtph_ps(halves);
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#endif
}

inline size_t strip_bytes(const Matrix &m) { return (size_t)m.inputs * WIDTH * (m.kind == FULL ? 4 : 2); }

template <int KIND, int COUNT>
void tile(const char *w, const float *x, size_t ldx, int depth, float *sums) {
  Vector left[COUNT], right[COUNT];
  each<COUNT>([&](auto i) { left[i] = right[i] = Vector{}; });
  for (int k = 0; k < depth; k++) {
    const Vector a = weights<KIND>(w, 2 * k), b = weights<KIND>(w, 2 * k + 1);
    each<COUNT>([&](auto i) {
      const Vector factor = fill(x[i * ldx + k]);
      left[i] += factor * a;
      right[i] += factor * b;
    });
  }
  each<COUNT>([&](auto i) {
    store(sums + i * WIDTH, left[i]);
    store(sums + i * WIDTH + LANES, right[i]);
  });
}

template <int KIND>
void tiles(const char *w, const float *x, size_t ldx, int rows, int depth, float *sums) {
  const int parts = (rows + ROWS - 1) / ROWS;
  for (int part = 0; part < parts; part++) {  // of equal size, almost: few rows are slow
    const int begin = (int64_t)rows * part / parts, end = (int64_t)rows * (part + 1) / parts;
    as_constant<ROWS>(end - begin, [&](auto count) { tile<KIND, count>(w, x + begin * ldx, ldx, depth, sums + begin * WIDTH); });
  }
}

template <int KIND>
void strip(const char *w, const float *x, size_t ldx, int rows, int depth, float *sums, float *plain) {
  if (KIND == FULL || rows <= ROWS) return tiles<KIND>(w, x, ldx, rows, depth, sums);
  for (int i = 0; i < 2 * depth; i++) store(plain + i * LANES, weights<KIND>(w, i));
  tiles<FULL>((const char *)plain, x, ldx, rows, depth, sums);
}

// Threads that walk through a program together. The one that calls `run` is one of them.
class Team {
 public:
  explicit Team(int size) : size(size) {
    for (int i = 1; i < size; i++) threads.emplace_back([this, i] { wait_for_work(i); });
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> guard(lock);
      ended = true;
    }
    wake.notify_all();
    for (std::thread &t : threads) t.join();
  }

  void run(const std::function<void(int)> &given) {
    {
      std::lock_guard<std::mutex> guard(lock);
      program = &given;
      calls++;
    }
    wake.notify_all();
    given(0);
    together();  // nobody is in the program any more
  }

  // Called by every member: items [0, count) are done by whoever is free; all are done when it returns.
  template <typename Call>
  void share(int count, Call call) {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) call(i);
    together();
  }

  const int size;

 private:
  std::vector<std::thread> threads;
  std::mutex lock;
  std::condition_variable wake;
  const std::function<void(int)> *program = nullptr;
  uint64_t calls = 0;
  bool ended = false;
  alignas(64) std::atomic<int> next{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<unsigned> phase{0};

  void together() {
    const unsigned now = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int tries = 0; phase.load(std::memory_order_acquire) == now; tries++)
      if (tries < 1000)
        _mm_pause();
      else
        std::this_thread::yield();  // another process has the core that we wait for
  }

  void wait_for_work(int me) {
    for (uint64_t done = 0;; done++) {
      const std::function<void(int)> *work;
      {
        std::unique_lock<std::mutex> guard(lock);
        wake.wait(guard, [&] { return ended || calls > done; });
        if (ended) return;
        work = program;
      }
      (*work)(me);
      together();
    }
  }
};

class Forward {
 public:
  Forward(const Model &model, const Step &step, Team &team, float *memory) : m(model), s(step), team(team), memory(memory) {
    q_width = m.heads * m.head_width;
    kv_width = m.kv_heads * m.head_width;
    for (int i = 0; i < s.sequence_count; i++) {
      const Sequence &one = s.sequences[i];
      longest = std::max(longest, one.known + one.count);
      for (int t = 0; t < one.count; t += TOKENS)
        for (int h = 0; h < m.kv_heads; h++) items.push_back({i, h, t});
    }
    longest = (longest + LANES - 1) / LANES * LANES;
    const size_t n = s.rows;
    hidden = take(n * m.width), normed = take(n * m.width), attended = take(n * q_width);
    q = take(n * q_width), k = take(n * kv_width), v = take(n * kv_width);
    product = take(n * m.inner);
    low = take(n * LINEARS * s.rank);
    own = used;
    used += team.size * part_size();
  }

  size_t size() const { return used; }

  void run() {
    team.run([this](int me) { work(me); });
  }
  void run_alone() const { work(0); }

 private:
  struct Item {
    int sequence, head, token;
  };
  const Model &m;
  const Step &s;
  Team &team;
  float *memory;
  std::vector<Item> items;
  size_t used = 0, own;
  int q_width, kv_width, longest = 0;
  float *hidden, *normed, *attended, *q, *k, *v, *product, *low;

  float *take(size_t count) {
    float *found = memory ? memory + used : nullptr;
    used += (count + 15) / 16 * 16;
    return found;
  }
  size_t rows_size() const { return (size_t)s.rows * WIDTH; }
  size_t part_size() const {  // each thread's own
    return 2 * rows_size() + (size_t)std::max({m.inner, q_width, m.width}) * WIDTH + (size_t)HEADS * longest;
  }

  const LowRank *adapter(int row, int layer) const {
    const LowRank *all = s.sequences[s.owners[row]].adapter;
    return all ? all + layer * LINEARS : nullptr;
  }
  float *low_row(int row, int linear) const { return low + ((size_t)row * LINEARS + linear) * s.rank; }

  void norm(const float *x, const float *weight, float *y, int width) const {
    Vector squares{};
    for (int i = 0; i < width; i += LANES) squares += load(x + i) * load(x + i);
    const float scale = 1 / std::sqrt(added(squares) / width + m.epsilon);
    for (int i = 0; i < width; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
  }

  // x A^T of the row's own adapter
  void lower(int row, int layer, int linear, const float *x) const {
    const LowRank *own_adapter = adapter(row, layer);
    if (!own_adapter) return;
    const int inputs = m.layers[layer].linear[linear].inputs;
    const LowRank &l = own_adapter[linear];
    float *to = low_row(row, linear);
    for (int r = 0; r < l.rank; r++) {
      const float *a = l.a + (size_t)r * inputs;
      Vector even{}, odd{};
      int i = 0;
      for (; i + WIDTH <= inputs; i += WIDTH) {
        even += load(x + i) * load(a + i);
        odd += load(x + i + LANES) * load(a + i + LANES);
      }
      if (i < inputs) even += load(x + i) * load(a + i);
      to[r] = added(even + odd);
    }
  }

  // Sums of a strip for all given rows, (rows, WIDTH); linear < 0: no adapter changes this matrix.
  void sums_of(const Matrix &matrix, int at, int layer, int linear, const float *x, int rows, float *sums, float *plain) const {
    const char *w = matrix.weight + at * strip_bytes(matrix);
    if (matrix.kind == FULL) strip<FULL>(w, x, matrix.inputs, rows, matrix.inputs, sums, plain);
    if (matrix.kind == HALF) strip<HALF>(w, x, matrix.inputs, rows, matrix.inputs, sums, plain);
    if (matrix.kind == BRAIN) strip<BRAIN>(w, x, matrix.inputs, rows, matrix.inputs, sums, plain);
    const int first = at * WIDTH;
    if (matrix.bias)
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < WIDTH; i += LANES)
          store(sums + r * WIDTH + i, load(sums + r * WIDTH + i) + load(matrix.bias + first + i));
    for (int r = 0; r < rows && linear >= 0; r++) {
      const LowRank *own_adapter = adapter(r, layer);
      if (!own_adapter || !own_adapter[linear].rank) continue;
      const LowRank &l = own_adapter[linear];
      const float *t = low_row(r, linear), *b = l.b + first;
      Vector left = load(sums + r * WIDTH), right = load(sums + r * WIDTH + LANES);
      for (int i = 0; i < l.rank; i++, b += matrix.outputs) {
        const Vector factor = fill(t[i]);
        left += factor * load(b);
        right += factor * load(b + LANES);
      }
      store(sums + r * WIDTH, left);
      store(sums + r * WIDTH + LANES, right);
    }
  }

  void work(int me) const {
    float *sums = memory + own + me * part_size(), *more = sums + rows_size(), *plain = more + rows_size();
    float *scores = plain + (size_t)std::max({m.inner, q_width, m.width}) * WIDTH;
    const int width = m.width;
    bool adapted = false;
    for (int i = 0; i < s.sequence_count; i++) adapted = adapted || s.sequences[i].adapter;

    team.share(s.rows, [&](int r) {
      std::memcpy(hidden + (size_t)r * width, m.embedding + (size_t)s.ids[r] * width, sizeof(float) * width);
    });
    for (int i = 0; i < m.depth; i++) {
      const Layer &layer = m.layers[i];
      const Matrix *linear = layer.linear;

      team.share(s.rows, [&](int r) {
        float *x = normed + (size_t)r * width;
        norm(hidden + (size_t)r * width, layer.norm_attention, x, width);
        for (int l : {Q, K, V}) lower(r, i, l, x);
      });
      const int q_strips = q_width / WIDTH, kv_strips = kv_width / WIDTH;
      team.share(q_strips + 2 * kv_strips, [&](int at) {
        const int which = at < q_strips ? Q : at < q_strips + kv_strips ? K : V;
        at -= which == Q ? 0 : which == K ? q_strips : q_strips + kv_strips;
        float *to = which == Q ? q : which == K ? k : v;
        sums_of(linear[which], at, i, which, normed, s.rows, sums, plain);
        for (int r = 0; r < s.rows; r++)
          std::memcpy(to + (size_t)r * linear[which].outputs + at * WIDTH, sums + r * WIDTH, sizeof(float) * WIDTH);
      });
      team.share(s.rows, [&](int r) { place(r, i); });
      team.share((int)items.size(), [&](int n) { attend(items[n], i, scores); });
      if (adapted) team.share(s.rows, [&](int r) { lower(r, i, O, attended + (size_t)r * q_width); });
      team.share(width / WIDTH, [&](int at) { add(linear[O], at, i, O, attended, sums, plain); });
      team.share(s.rows, [&](int r) {
        float *x = normed + (size_t)r * width;
        norm(hidden + (size_t)r * width, layer.norm_mlp, x, width);
        for (int l : {GATE, UP}) lower(r, i, l, x);
      });
      team.share(m.inner / WIDTH, [&](int at) {
        sums_of(linear[GATE], at, i, GATE, normed, s.rows, sums, plain);
        sums_of(linear[UP], at, i, UP, normed, s.rows, more, plain);
        for (int r = 0; r < s.rows; r++)
          for (int j = 0; j < WIDTH; j += LANES) {
            const Vector gate = load(sums + r * WIDTH + j);
            const Vector silu = gate / (1.0f + exponential(-gate));
            store(product + (size_t)r * m.inner + at * WIDTH + j, silu * load(more + r * WIDTH + j));
          }
      });
      if (adapted) team.share(s.rows, [&](int r) { lower(r, i, DOWN, product + (size_t)r * m.inner); });
      team.share(width / WIDTH, [&](int at) { add(linear[DOWN], at, i, DOWN, product, sums, plain); });
    }
    if (!s.count) return;
    team.share(s.count, [&](int n) {
      norm(hidden + (size_t)s.chosen[n] * width, m.norm, normed + (size_t)n * width, width);
    });
    const int vocabulary = m.head.outputs;
    team.share((vocabulary + WIDTH - 1) / WIDTH, [&](int at) {
      sums_of(m.head, at, 0, -1, normed, s.count, sums, plain);
      const size_t count = std::min(WIDTH, vocabulary - at * WIDTH);
      for (int n = 0; n < s.count; n++)
        std::memcpy(s.logits + (size_t)n * vocabulary + at * WIDTH, sums + n * WIDTH, sizeof(float) * count);
    });
  }

  // hidden += the strip
  void add(const Matrix &matrix, int at, int layer, int linear, const float *x, float *sums, float *plain) const {
    sums_of(matrix, at, layer, linear, x, s.rows, sums, plain);
    for (int r = 0; r < s.rows; r++) {
      float *to = hidden + (size_t)r * m.width + at * WIDTH;
      for (int j = 0; j < WIDTH; j += LANES) store(to + j, load(to + j) + load(sums + r * WIDTH + j));
    }
  }

  float *keys(const Sequence &one, int layer, int head) const {
    return one.cache + ((size_t)layer * 2 * m.kv_heads + head) * one.capacity * m.head_width;
  }
  float *values(const Sequence &one, int layer, int head) const { return keys(one, layer, m.kv_heads + head); }

  void rotate(const Layer &layer, float *x, int position) const {
    const int half = m.rotary / 2;
    const float *cosine = layer.cosine + (size_t)position * half, *sine = layer.sine + (size_t)position * half;
    const int step = m.traditional ? 2 : 1, other = m.traditional ? 1 : half;
    for (int i = 0; i < half; i++) {
      float &a = x[i * step], &b = x[i * step + other];
      const float u = a, w = b;
      a = u * cosine[i] - w * sine[i], b = u * sine[i] + w * cosine[i];
    }
  }

  // A row's queries are turned by its position; its keys too, and they and the values go into the cache.
  void place(int row, int i) const {
    const Layer &layer = m.layers[i];
    const Sequence &one = s.sequences[s.owners[row]];
    const int d = m.head_width, position = one.known + row - one.begin;
    for (int h = 0; h < m.heads; h++) {
      float *x = q + (size_t)row * q_width + h * d;
      if (layer.norm_q) norm(x, layer.norm_q, x, d);
      rotate(layer, x, position);
      const float scale = 1 / std::sqrt((float)d);
      for (int j = 0; j < d; j += LANES) store(x + j, load(x + j) * scale);
    }
    for (int h = 0; h < m.kv_heads; h++) {
      float *x = k + (size_t)row * kv_width + h * d;
      if (layer.norm_k) norm(x, layer.norm_k, x, d);
      rotate(layer, x, position);
      float *to = keys(one, i, h) + (size_t)(position / LANES) * d * LANES + position % LANES;
      for (int j = 0; j < d; j++) to[j * LANES] = x[j];
      std::memcpy(values(one, i, h) + (size_t)position * d, v + (size_t)row * kv_width + h * d, sizeof(float) * d);
    }
  }

  void attend(const Item &item, int layer, float *scores) const {
    const Sequence &one = s.sequences[item.sequence];
    const int d = m.head_width, group = m.heads / m.kv_heads;
    const float *some_keys = keys(one, layer, item.head), *some_values = values(one, layer, item.head);
    for (int t = item.token; t < std::min(one.count, item.token + TOKENS); t++) {
      const size_t at = (size_t)(one.begin + t) * q_width + item.head * group * d;
      for (int h = 0; h < group; h += HEADS)
        as_constant<HEADS>(std::min(HEADS, group - h), [&](auto count) {
          attend_heads<count>(q + at + h * d, some_keys, some_values, one.known + t + 1, attended + at + h * d, scores);
        });
    }
  }

  // COUNT heads of one row, next to each other, that look at `seen` keys.
  template <int COUNT>
  void attend_heads(const float *x, const float *some_keys, const float *some_values, int seen, float *to, float *scores) const {
    const int d = m.head_width, blocks = (seen + LANES - 1) / LANES;
    Integers lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    Vector most[COUNT];
    each<COUNT>([&](auto h) { most[h] = fill(-INFINITY); });
    for (int b = 0; b < blocks; b++) {
      const float *block = some_keys + (size_t)b * d * LANES;
      Vector found[COUNT];
      each<COUNT>([&](auto h) { found[h] = Vector{}; });
      for (int j = 0; j < d; j++) {
        const Vector key = load(block + j * LANES);
        each<COUNT>([&](auto h) { found[h] += fill(x[h * d + j]) * key; });
      }
      each<COUNT>([&](auto h) {
        found[h] = lane < seen - b * LANES ? found[h] : fill(-INFINITY);
        most[h] = larger(most[h], found[h]);
        store(scores + (size_t)h * longest + b * LANES, found[h]);
      });
    }
    float share[COUNT];
    each<COUNT>([&](auto h) {
      float *row = scores + (size_t)h * longest;
      const float top = largest(most[h]);
      Vector sum{};
      for (int b = 0; b < blocks; b++) {
        const Vector score = load(row + b * LANES);
        const Vector power = lane < seen - b * LANES ? exponential(score - top) : Vector{};
        sum += power;
        store(row + b * LANES, power);
      }
      share[h] = 1 / added(sum);
    });
    for (int j = 0; j < d; j += LANES) {
      Vector found[COUNT];
      each<COUNT>([&](auto h) { found[h] = Vector{}; });
      for (int p = 0; p < seen; p++) {
        const Vector value = load(some_values + (size_t)p * d + j);
        each<COUNT>([&](auto h) { found[h] += fill(scores[(size_t)h * longest + p]) * value; });
      }
      each<COUNT>([&](auto h) { store(to + h * d + j, found[h] * share[h]); });
    }
  }
};

}  // namespace

extern "C" {

int metapeft_serve_lanes() { return LANES; }

void *metapeft_serve_start(int threads) { return new Team(threads); }

void metapeft_serve_stop(void *team) { delete (Team *)team; }

// Steps that have no sequence in common, one after another by the whole team, or (`apart`) each by one thread: that needs
// every weight more often, but nobody ever waits for anybody. Returns the floats of memory needed; without any, no more.
size_t metapeft_serve_step(const Model *model, const Step *steps, int count, int apart, void *given, float *memory) {
  Team &team = *(Team *)given;
  std::deque<Team> alone;
  std::vector<Forward> work;
  size_t used = 0;
  for (int i = 0; i < count; i++) {
    work.emplace_back(*model, steps[i], apart ? alone.emplace_back(1) : team, memory ? memory + used : nullptr);
    used += work.back().size();
  }
  if (!memory) return used;
  if (!apart)
    for (Forward &one : work) one.run();
  else if (count == 1)
    work[0].run_alone();
  else
    team.run([&](int) { team.share(count, [&](int i) { work[i].run_alone(); }); });
  return used;
}
}

#else

extern "C" int metapeft_serve_lanes() { return 0; }

#endif
