// The two operations that sampling on a CPU spends its time in: products with weights (few rows in decode steps, many
// in prefill), and attention of a few queries over pages. The order of a sum does not depend on the number of slots or
// threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__AVX512F__)
#error "These kernels need AVX-512; without it, XLA's products are faster."
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 64;  // lines of a matrix to prefetch
constexpr int64_t kRowsAhead = 12;  // rows of keys or values to prefetch
constexpr int64_t kTile = 16;  // rows of x whose sums fit in the registers of an AVX-512 core
constexpr int64_t kNarrow = 8;  // rows of the last panel if they are enough
constexpr int64_t kNear = 1 << 18;  // bytes of panels that stay in a core's cache while weights stream through it

using Floats = float __attribute__((vector_size(4 * kLanes)));
using EightFloats = float __attribute__((vector_size(32)));
using FourFloats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

inline float AsFloat(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// ---- Registers and threads

inline Floats Load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats Load(const uint16_t* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

template <typename Half, typename Whole>
Half Folded(Whole x) {
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  return halves[0] + halves[1];
}

inline float Sum(Floats x) {
  const auto four = Folded<FourFloats>(Folded<EightFloats>(x));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Register c of `kChunks` registers of a row; with kChunks = 1, only its first `left` numbers, then zeros.
template <int64_t kChunks, typename T>
Floats Chunk(const T* row, int64_t c, int64_t left) {
  if (kChunks > 1 || left == kLanes) return Load(row + c * kLanes);
  T some[kLanes] = {};
  std::memcpy(some, row, left * sizeof(T));
  return Load(some);
}

inline void Round(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }

inline void Round(const float* from, int64_t count, uint16_t* to) {  // to the nearest bfloat16, ties to even
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    to[i] = std::isnan(from[i]) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

// Runs task(i) for all i < count. Each thread first does its own part in order, then helps with the other parts. A
// thread that starts late finds no work left, and nobody waits for a thread that has not started, so the programs of
// several devices can share one pool.
template <typename Task>
void ForAll(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, std::max<int64_t>(count, 1));
  struct Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Progress {
    std::vector<Part> parts;
    std::atomic<int64_t> threads{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  progress->parts = std::vector<Part>(threads);
  for (int64_t t = 0; t < threads; ++t) {
    progress->parts[t].next = count * t / threads;
    progress->parts[t].end = count * (t + 1) / threads;
  }
  auto some = [=] {
    const int64_t own = progress->threads.fetch_add(1);
    for (int64_t other = 0; other < threads; ++other) {
      Part& part = progress->parts[(own + other) % threads];
      for (int64_t i; (i = part.next.fetch_add(1)) < part.end; progress->done.fetch_add(1)) task(i);
    }
  };
  for (int64_t helpers = 1; helpers < threads; ++helpers) {
    auto helper = some;
    pool.Schedule(std::move(helper));
  }
  some();
  while (progress->done.load() < count) std::this_thread::yield();
}

// ---- y [M, F] = x [M, D] w^T [D, F]
//
// w is one of L matrices stored in lines of 64 bytes, [L, F / 16, D, 16] in float32 or [L, F / 16, D / 2, 16, 2] in
// bfloat16. A line is what a core multiplies at once; lines are stored in reading order, and no sum runs across the
// lanes of a register. x is copied to panels of 16 rows, [D, 16] words of one float32 or two bfloat16; the last panel
// may have 8 rows.

struct Float32 {
  using Number = float;
  static Floats Plus(Floats sum, Words w, uint32_t x) { return sum + (Floats)w * AsFloat(x); }
};

struct PairOfBfloat16 {  // a bfloat16 is the upper half of a float32
  using Number = uint16_t;
  static Floats Plus(Floats sum, Words w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else
    sum += (Floats)(w << 16) * AsFloat(x << 16);
    return sum + (Floats)(w & 0xffff0000u) * AsFloat(x & 0xffff0000u);
#endif
  }
};

struct Factors {
  const uint32_t* lines;
  const float *rows, *scale;  // scale: of the RMS norm of each row; null without a norm
  float epsilon;
  uint32_t* panels;
  float* out;
  int64_t count, size, depth, outputs;  // M, D, words per row, F
};

// Fills the panel of `width` rows from row `first` on, normed and rounded; zeros after the last row.
template <typename T>
void Panel(const Factors& of, int64_t first, int64_t width, uint32_t* panel) {
  constexpr int64_t kNumbers = 4 / sizeof(T);
  thread_local std::vector<float> of_normed;
  thread_local std::vector<T> of_rounded;
  of_normed.resize(of.size);
  of_rounded.assign(of.depth * kNumbers, 0);
  float* normed = of_normed.data();
  T* rounded = of_rounded.data();
  for (int64_t n = 0; n < width; ++n) {
    const float* row = of.rows + (first + n) * of.size;
    if (first + n >= of.count) {
      for (int64_t d = 0; d < of.depth; ++d) panel[d * width + n] = 0;
      continue;
    }
    if (of.scale) {
      Floats squares = {};
      for (int64_t d = 0; d < of.size; d += kLanes) {
        const Floats some = Chunk<1>(row + d, 0, std::min(kLanes, of.size - d));
        squares += some * some;
      }
      const float by = 1 / std::sqrt(Sum(squares) / of.size + of.epsilon);
      for (int64_t d = 0; d < of.size; ++d) normed[d] = row[d] * by * of.scale[d];
      row = normed;
    }
    Round(row, of.size, rounded);
    for (int64_t d = 0; d < of.depth; ++d) std::memcpy(panel + d * width + n, rounded + d * kNumbers, 4);
  }
}

// The product of 16 rows of w and one panel.
template <typename Of, int64_t kWidth>
void Tile(const Factors& of, int64_t block, const uint32_t* panel, int64_t first) {
  const uint32_t* w = of.lines + block * of.depth * kLanes;
  Floats sums[kWidth] = {};
  for (int64_t d = 0; d < of.depth; ++d, w += kLanes, panel += kWidth) {
    Words line;
    std::memcpy(&line, w, sizeof line);
    __builtin_prefetch(w + kAhead * kLanes);
#pragma GCC unroll 16
    for (int64_t n = 0; n < kWidth; ++n) sums[n] = Of::Plus(sums[n], line, panel[n]);
  }
  const int64_t numbers = std::min(kLanes, of.outputs - block * kLanes);
  float* out = of.out + first * of.outputs + block * kLanes;
  for (int64_t n = 0; n < std::min(kWidth, of.count - first); ++n)
    std::memcpy(out + n * of.outputs, sums + n, numbers * sizeof(float));
}

template <typename Of>
void Product(ffi::ThreadPool& pool, const Factors& of) {
  const auto width = [=](int64_t panel) { return of.count - panel * kTile > kNarrow ? kTile : kNarrow; };
  const int64_t panels = (of.count + kTile - 1) / kTile, blocks = (of.outputs + kLanes - 1) / kLanes;
  const auto fill = [=](int64_t p) {
    Panel<typename Of::Number>(of, p * kTile, width(p), of.panels + p * kTile * of.depth);
  };
  if (panels < 4)
    for (int64_t p = 0; p < panels; ++p) fill(p);
  else
    ForAll(pool, panels, fill);
  const int64_t together = std::max<int64_t>(1, kNear / (kTile * of.depth * 4));
  ForAll(pool, (panels + together - 1) / together * blocks, [=](int64_t i) {
    const int64_t first = i / blocks * together, block = i % blocks;
    for (int64_t p = first; p < std::min(first + together, panels); ++p) {
      const uint32_t* panel = of.panels + p * kTile * of.depth;
      if (width(p) == kTile)
        Tile<Of, kTile>(of, block, panel, p * kTile);
      else
        Tile<Of, kNarrow>(of, block, panel, p * kTile);
    }
  });
}

ffi::Error PackedDot(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> which, ffi::Buffer<ffi::F32> x,
                     ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::U32> panels,
                     float epsilon) {
  const auto of_w = w.dimensions(), of_x = x.dimensions(), of_y = y->dimensions(), of_panels = panels->dimensions();
  const bool in_pairs = w.element_type() == ffi::BF16, normed = scale.element_count() > 0;
  if ((!in_pairs && w.element_type() != ffi::F32) || of_w.size() != (in_pairs ? 5 : 4) || of_w[3] != kLanes ||
      (in_pairs && of_w[4] != 2) || which.element_count() != 1 || of_panels.size() != 3 ||
      of_panels[0] != (of_x[0] + kTile - 1) / kTile || of_panels[1] != of_w[2] || of_panels[2] != kTile ||
      of_x.size() != 2 || of_w[2] != (in_pairs ? (of_x[1] + 1) / 2 : of_x[1]) || of_y.size() != 2 ||
      of_y[0] != of_x[0] || (of_y[1] + kLanes - 1) / kLanes != of_w[1] ||
      (normed && static_cast<int64_t>(scale.element_count()) != of_w[0] * of_x[1]))
    return ffi::Error::InvalidArgument(
        "tpaw_packed_dot: the shapes or dtypes of the packed matrices, x, scale and the results do not match");
  const int64_t i = *which.typed_data(), blocks = of_w[1], depth = of_w[2];
  if (i < 0 || i >= of_w[0]) return ffi::Error::InvalidArgument("tpaw_packed_dot: there is no such layer");
  const Factors of{
      static_cast<const uint32_t*>(w.untyped_data()) + i * blocks * depth * kLanes,
      x.typed_data(), normed ? scale.typed_data() + i * of_x[1] : nullptr, epsilon,
      panels->typed_data(), y->typed_data(),
      of_x[0], of_x[1], depth, of_y[1],
  };
  in_pairs ? Product<PairOfBfloat16>(pool, of) : Product<Float32>(pool, of);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TpawPackedDot, PackedDot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<float>("epsilon"));

// ---- Attention over pages

// exp(x) for x <= 0, accurate to 2 units in the last place; 0 below -87.
inline Floats Exp(Floats x) {
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // x / ln 2, rounded
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  for (float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  p = p * r * r + r + 1.0f;
  return x < -87.0f ? Floats{} : (Floats)((Ints)p + (n << 23));
}

// Rows of keys or values, restricted to the columns from `first` on: 4 registers, or `left` numbers of one.
template <typename T>
struct Rows {
  const T* const* rows;
  int64_t count, first, left;

  // Row i. Prefetches a later row, because rows are too short for the hardware prefetcher to see the sequence.
  template <int64_t kChunks>
  const T* Row(int64_t i) const {
    const T* later = rows[std::min(i + kRowsAhead, count - 1)] + first;
    constexpr int64_t kNumbers = 64 / sizeof(T);
    for (int64_t at = 0; at < kChunks * kLanes; at += kNumbers) __builtin_prefetch(later + at);
    return rows[i] + first;
  }
};

// scores[g][i] += queries[g] . rows[i]
template <int64_t kChunks, int64_t kGroup, typename T>
void AddScores(const Rows<T>& rows, const float* queries, int64_t size, float* scores, int64_t room) {
  Floats of_query[kGroup][kChunks];
  for (int64_t g = 0; g < kGroup; ++g) {
    const float* query = queries + g * size + rows.first;
    for (int64_t c = 0; c < kChunks; ++c) of_query[g][c] = Chunk<kChunks>(query, c, rows.left);
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* row = rows.template Row<kChunks>(i);
    Floats of_row[kChunks];
    for (int64_t c = 0; c < kChunks; ++c) of_row[c] = Chunk<kChunks>(row, c, rows.left);
    for (int64_t g = 0; g < kGroup; ++g) {
      Floats products = of_query[g][0] * of_row[0];
      for (int64_t c = 1; c < kChunks; ++c) products += of_query[g][c] * of_row[c];
      scores[g * room + i] += Sum(products);
    }
  }
}

// out[g] = sum over i of shares[g][i] * rows[i]
template <int64_t kChunks, int64_t kGroup, typename T>
void SumRows(const Rows<T>& rows, const float* shares, int64_t room, float* out, int64_t size) {
  Floats sums[kGroup][kChunks] = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* row = rows.template Row<kChunks>(i);
    for (int64_t c = 0; c < kChunks; ++c) {
      const Floats of_row = Chunk<kChunks>(row, c, rows.left);
      for (int64_t g = 0; g < kGroup; ++g) sums[g][c] += of_row * shares[g * room + i];
    }
  }
  const int64_t numbers = kChunks > 1 ? kChunks * kLanes : rows.left;
  for (int64_t g = 0; g < kGroup; ++g) std::memcpy(out + g * size + rows.first, sums[g], numbers * sizeof(float));
}

// Calls use(chunks, first, left) for runs of `size` numbers: first those of 4 registers, then of one, or a part of one.
template <typename Use>
void ForRuns(int64_t size, const Use& use) {
  int64_t first = 0;
  for (; first + 4 * kLanes <= size; first += 4 * kLanes) use(std::integral_constant<int64_t, 4>(), first, kLanes);
  for (; first < size; first += kLanes)
    use(std::integral_constant<int64_t, 1>(), first, std::min(kLanes, size - first));
}

constexpr int64_t kTogether = 4;  // queries that share one pass over keys and values

// Calls use(together, first) for groups of up to 4 of `count` queries.
template <typename Use>
void ForQueries(int64_t count, const Use& use) {
  int64_t first = 0;
  for (; first + kTogether <= count; first += kTogether) use(std::integral_constant<int64_t, kTogether>(), first);
  if (count - first == 3) use(std::integral_constant<int64_t, 3>(), first);
  if (count - first == 2) use(std::integral_constant<int64_t, 2>(), first);
  if (count - first == 1) use(std::integral_constant<int64_t, 1>(), first);
}

// Softmax in place of `count` scores, in an array padded to a multiple of 16.
inline void Softmax(float* scores, int64_t count, float scale) {
  Floats top = Floats{} - 1e30f, total = {};
  std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, -1e30f);
  for (int64_t i = 0; i < count; i += kLanes) top = Load(scores + i) > top ? Load(scores + i) : top;
  float most = top[0];
  for (int64_t i = 1; i < kLanes; ++i) most = std::max(most, top[i]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats shares = Exp((Load(scores + i) - most) * scale);
    total += shares;
    std::memcpy(scores + i, &shares, sizeof shares);
  }
  const float whole = Sum(total);
  for (int64_t i = 0; i < count; ++i) scores[i] /= whole;
}

// Rotary embedding in the half-split layout.
inline void Rotate(const float* x, const float* cosines, const float* sines, int64_t size, float* out) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
    out[i + half] = x[i + half] * cosines[i] + x[i] * sines[i];
  }
}

struct Step {
  const float *heads_of_slots, *cosines, *sines;  // heads of a slot: queries, then keys, then values
  void *pool_keys, *pool_values;
  const int32_t *of_slot, *positions;
  float* out;
  int64_t shards, slots, heads, group, size, pages, page, blocks;  // heads: of keys, each with `group` queries
  int64_t window;                                                 // tokens that a query sees, its own included
};

// Slot m, key head k: writes the new token into its page, and attends from its queries to that token and all before it.
template <typename T>
void AttendHead(const Step& of, int64_t m, int64_t k) {
  const int64_t size = of.size, row = of.heads * size, position = of.positions[m];
  const float* queries = of.heads_of_slots + (m * (of.group + 2) * of.heads + k * of.group) * size;
  const float* key = of.heads_of_slots + (m * (of.group + 2) * of.heads + of.group * of.heads + k) * size;
  float* out = of.out + (m * of.heads + k) * of.group * size;
  const int64_t in_pool = m / of.slots * of.pages * of.page * row + k * size;
  T *pool_keys = static_cast<T*>(of.pool_keys) + in_pool, *pool_values = static_cast<T*>(of.pool_values) + in_pool;
  const float *cosines = of.cosines + m * (size / 2), *sines = of.sines + m * (size / 2);
  thread_local std::vector<const T*> of_rows;
  thread_local std::vector<T> of_own;
  thread_local std::vector<float> of_floats;
  const int64_t room = (position + kLanes) / kLanes * kLanes;  // scores of a query over position + 1 tokens, padded
  of_rows.resize(2 * (position + 1));
  of_own.resize(2 * size);
  of_floats.resize(kTogether * (size + room));
  const T **keys = of_rows.data(), **values = keys + position + 1;
  T *own_key = of_own.data(), *own_value = own_key + size;
  float *rotated = of_floats.data(), *scores = rotated + kTogether * size;

  Rotate(key, cosines, sines, size, rotated);
  Round(rotated, size, own_key);
  Round(key + of.heads * size, size, own_value);
  int64_t count = 0;
  for (int64_t block = 0; block < of.blocks && block * of.page <= position; ++block) {
    const int64_t page = of.of_slot[m * of.blocks + block], before = position - block * of.page;
    if (page < 0 || page >= of.pages) continue;
    const int64_t at = page * of.page * row;
    for (int64_t t = std::max<int64_t>(0, before - of.window + 1); t < std::min(before, of.page); ++t, ++count) {
      keys[count] = pool_keys + at + t * row;
      values[count] = pool_values + at + t * row;
    }
    if (before < of.page) {
      std::copy_n(own_key, size, pool_keys + at + before * row);
      std::copy_n(own_value, size, pool_values + at + before * row);
    }
  }
  keys[count] = own_key;
  values[count++] = own_value;

  ForQueries(of.group, [&](auto together, int64_t q) {
    for (int64_t g = 0; g < together(); ++g)
      Rotate(queries + (q + g) * size, cosines, sines, size, rotated + g * size);
    std::fill_n(scores, together() * room, 0.0f);
    ForRuns(size, [&](auto chunks, int64_t first, int64_t left) {
      AddScores<chunks(), together()>(Rows<T>{keys, count, first, left}, rotated, size, scores, room);
    });
    for (int64_t g = 0; g < together(); ++g)
      Softmax(scores + g * room, count, 1 / std::sqrt(static_cast<float>(size)));
    ForRuns(size, [&](auto chunks, int64_t first, int64_t left) {
      SumRows<chunks(), together()>(Rows<T>{values, count, first, left}, scores, room, out + q * size, size);
    });
  });
}

ffi::Error AttendPages(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> heads_of_slots, ffi::Buffer<ffi::F32> cosines,
                       ffi::Buffer<ffi::F32> sines, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Buffer<ffi::S32> of_slot,
                       ffi::Buffer<ffi::S32> positions, ffi::ResultBuffer<ffi::F32> out,
                       ffi::Result<ffi::AnyBuffer> pool_keys, ffi::Result<ffi::AnyBuffer> pool_values,
                       int64_t window) {
  const auto h = heads_of_slots.dimensions(), o = out->dimensions(), u = pool_keys->dimensions();
  const auto table = of_slot.dimensions();
  const bool ranks = h.size() == 4 && o.size() == 4 && u.size() == 4 && table.size() == 3;
  const int64_t size = ranks ? h[3] : 0, kv_heads = size ? u[3] / size : 0;
  if (!kv_heads || u[3] % size || size % 2 || h[2] != o[2] + 2 * kv_heads || o[2] % kv_heads || o[3] != size ||
      pool_values->element_count() != pool_keys->element_count() || table[0] != h[0] || table[1] != h[1] ||
      o[0] != h[0] || o[1] != h[1] || u[0] != h[0] || sines.element_count() != cosines.element_count() ||
      positions.element_count() != table[0] * table[1] || cosines.element_count() != table[0] * table[1] * size / 2 ||
      std::any_of(positions.typed_data(), positions.typed_data() + table[0] * table[1], [](auto p) { return p < 0; }) ||
      pool_values->element_type() != pool_keys->element_type())
    return ffi::Error::InvalidArgument(
        "tpaw_attend_pages: the shapes or dtypes of heads, angles, pools, page table and positions do not match, or a "
        "position is negative");
  const Step of{
      heads_of_slots.typed_data(), cosines.typed_data(), sines.typed_data(), pool_keys->untyped_data(),
      pool_values->untyped_data(), of_slot.typed_data(), positions.typed_data(), out->typed_data(),
      h[0], h[1], kv_heads, o[2] / kv_heads, size, u[1], u[2], table[2], window,
  };
  const int64_t heads = of.shards * of.slots * of.heads;
  if (pool_keys->element_type() == ffi::F32)
    ForAll(pool, heads, [=](int64_t i) { AttendHead<float>(of, i / of.heads, i % of.heads); });
  else if (pool_keys->element_type() == ffi::BF16)
    ForAll(pool, heads, [=](int64_t i) { AttendHead<uint16_t>(of, i / of.heads, i % of.heads); });
  else
    return ffi::Error::InvalidArgument("tpaw_attend_pages: the pools must be float32 or bfloat16");
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TpawAttendPages, AttendPages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window"));
