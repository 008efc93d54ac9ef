// Matrix products of few rows with large matrices, as a decoder's layers need them: y = x W^T and dx = dy W with W
// (outputs, inputs) as it lies in memory. A general product first copies W into an order of its own, which for the few
// rows of a batch costs a quarter of the time; here W is read once, in order, and only the rows are copied.
//
// Each element is one sum in the order of the inner dimension, wherever it lies and whatever lies beside it.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define METAPEFT_LANES 16
#define METAPEFT_TILE 9
#elif defined(__AVX2__) && defined(__FMA__)
#define METAPEFT_LANES 8
#define METAPEFT_TILE 4
#endif

#ifdef METAPEFT_LANES

namespace products {

constexpr int LANES = METAPEFT_LANES, TILE = METAPEFT_TILE, VECTORS = 3, PANEL = LANES * VECTORS;
constexpr size_t CHUNK = 110592;  // floats of W at a time in dx = dy W: they stay in a core's cache

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float *from) { return *(const Vector *)from; }
inline void store(float *to, Vector value) { *(Vector *)to = value; }

#define ALWAYS __attribute__((always_inline)) inline

// Calls with 0, 1, … COUNT - 1 as constants: arrays that are only indexed so stay in registers.
template <typename Call, int... I>
ALWAYS void each(std::integer_sequence<int, I...>, Call call) {
  (call(std::integral_constant<int, I>()), ...);
}
template <int COUNT, typename Call>
ALWAYS void each(Call call) {
  each(std::make_integer_sequence<int, COUNT>(), call);
}

// Calls with `count`, 1 to MOST, as a constant.
template <int MOST, typename Call>
ALWAYS void as_constant(int count, Call call) {
  if constexpr (MOST > 1) {
    if (count < MOST) return as_constant<MOST - 1>(count, call);
  }
  call(std::integral_constant<int, MOST>());
}

// sums[i * N + j] += sum over k of a[i][k] * p[k][j]: ROWS rows of a, N vectors wide.
template <int ROWS, int N>
ALWAYS void add_products(const float *a, size_t lda, const float *p, size_t ldp, int depth, Vector (&sums)[ROWS * N]) {
  const float *at[ROWS];
  each<ROWS>([&](auto i) { at[i] = a + i * lda; });
  for (int k = 0; k < depth; k++, p += ldp) {
    Vector row[N];
    each<N>([&](auto j) { row[j] = load(p + j * LANES); });
    each<ROWS>([&](auto i) {
      const Vector factor = at[i][k] - Vector{};
      each<N>([&](auto j) { sums[i * N + j] += factor * row[j]; });
    });
  }
}

// Rows of x, transposed, in panels of PANEL rows: panel[k][row]. Zeros fill the last one.
inline size_t packed_size(size_t rows, size_t depth) { return (rows + PANEL - 1) / PANEL * PANEL * depth; }

inline void pack(const float *x, int rows, int depth, float *to) {
  for (int begin = 0; begin < rows; begin += PANEL, to += (size_t)PANEL * depth) {
    const int count = std::min(PANEL, rows - begin);
    if (count < PANEL) std::memset(to, 0, sizeof(float) * PANEL * depth);
    for (int k0 = 0; k0 < depth; k0 += 16) {
      const int k1 = std::min(depth, k0 + 16);
      for (int r = 0; r < count; r++)
        for (int k = k0; k < k1; k++) to[(size_t)k * PANEL + r] = x[(size_t)(begin + r) * depth + k];
    }
  }
}

struct Low {  // of rank `rank`: its part of each sum comes last
  const float *rows;   // forward: B (outputs, rank); backward: dt (rows, rank)
  const float *panel;  // forward: t packed; backward: A (rank, inputs)
  int rank;
};

template <int ROWS, int N>
void forward_tile(const float *w, const float *panel, int depth, const Low &low, const float *low_panel, int count,
                  float *y, size_t ldy, bool add) {
  Vector sums[ROWS * N];
  each<ROWS * N>([&](auto i) { sums[i] = Vector{}; });
  add_products<ROWS, N>(w, depth, panel, PANEL, depth, sums);
  if (low.rank) add_products<ROWS, N>(low.rows, low.rank, low_panel, PANEL, low.rank, sums);
  float tile[ROWS][N * LANES];
  each<ROWS * N>([&](auto i) { store(&tile[i / N][i % N * LANES], sums[i]); });
  for (int r = 0; r < count; r++)
    for (int i = 0; i < ROWS; i++) y[r * ldy + i] = (add ? y[r * ldy + i] : 0.0f) + tile[i][r];
}

template <int ROWS>
void forward_rows(const float *w, const float *packed, int rows, int depth, Low low, float *y, size_t ldy, bool add) {
  for (int begin = 0; begin < rows; begin += PANEL) {
    const int count = std::min(PANEL, rows - begin);
    const float *panel = packed + (size_t)begin * depth, *low_panel = low.panel + (size_t)begin * low.rank;
    float *to = y + begin * ldy;
    if (count <= LANES)
      forward_tile<ROWS, 1>(w, panel, depth, low, low_panel, count, to, ldy, add);
    else if (count <= 2 * LANES)
      forward_tile<ROWS, 2>(w, panel, depth, low, low_panel, count, to, ldy, add);
    else
      forward_tile<ROWS, 3>(w, panel, depth, low, low_panel, count, to, ldy, add);
  }
}

// y = (0 or y) + x W^T + t B^T; x and t are packed.
inline void forward(const float *packed, int rows, int depth, const float *w, int outputs, Low low, float *y, bool add) {
  for (int o = 0; o < outputs; o += TILE) {
    const Low part{low.rows + (size_t)o * low.rank, low.panel, low.rank};
    as_constant<TILE>(std::min(TILE, outputs - o), [&](auto count) {
      forward_rows<count>(w + (size_t)o * depth, packed, rows, depth, part, y + o, outputs, add);
    });
  }
}

template <int ROWS, int N>
inline void backward_tile(const float *dy, size_t ldy, const float *panel, size_t ldp, int depth, const float *low_rows,
                   const float *low_panel, size_t lda, int rank, float *dx, size_t ldx, bool add) {
  Vector sums[ROWS * N];
  each<ROWS * N>([&](auto i) { sums[i] = add ? load(dx + i / N * ldx + i % N * LANES) : Vector{}; });
  add_products<ROWS, N>(dy, ldy, panel, ldp, depth, sums);
  if (rank) add_products<ROWS, N>(low_rows, rank, low_panel, lda, rank, sums);
  each<ROWS * N>([&](auto i) { store(dx + i / N * ldx + i % N * LANES, sums[i]); });
}

template <int N>
void backward_columns(const float *dy, int rows, size_t ldy, const float *panel, size_t ldp, int depth, const Low &low,
                      const float *low_panel, size_t inputs, float *dx, bool add) {
  for (int r = 0; r < rows; r += TILE)
    as_constant<TILE>(std::min(TILE, rows - r), [&](auto count) {
      backward_tile<count, N>(dy + r * ldy, ldy, panel, ldp, depth, low.rows + (size_t)r * low.rank, low_panel, inputs,
                              low.rank, dx + r * inputs, inputs, add);
    });
}

// dx = (0 or dx) + dy W + dt A. `inputs` must be a multiple of LANES.
inline void backward(const float *dy, int rows, int outputs, const float *w, int inputs, Low low, float *dx, bool add) {
  const int step = std::max<int>(16, CHUNK / inputs);
  for (int begin = 0; begin < outputs; begin += step) {
    const int depth = std::min(step, outputs - begin);
    const bool last = begin + depth == outputs;
    const Low part{low.rows, low.panel, last ? low.rank : 0};
    const float *chunk = w + (size_t)begin * inputs;
    int c = 0;
    for (; c + PANEL <= inputs; c += PANEL)
      backward_columns<3>(dy + begin, rows, outputs, chunk + c, inputs, depth, part, low.panel + c, inputs, dx + c,
                          add || begin > 0);
    for (; c < inputs; c += LANES)
      backward_columns<1>(dy + begin, rows, outputs, chunk + c, inputs, depth, part, low.panel + c, inputs, dx + c,
                          add || begin > 0);
  }
}

}  // namespace products

#endif
