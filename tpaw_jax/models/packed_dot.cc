// y [F, N] = w [F, D] x [D, N] in float32, for a matrix that is read once and few columns.
//
// The matrix is in lines of 64 bytes, [F / 16, D, 16] of float32 or [F / 16, D / 2, 16, 2] of bfloat16: what a core
// multiplies at once, in the order in which it is read, so that sums stay in registers and are never added up across
// them. An element of y is summed over D in one order, however many columns and threads there are.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 64;  // lines asked for before they are needed
#if defined(__AVX512F__)
constexpr int64_t kTile = 16;  // columns whose sums fit in the registers of a core
#else
constexpr int64_t kTile = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

inline float AsFloat(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

struct Float32 {
  static Floats Plus(Floats sum, Words w, uint32_t x) { return sum + (Floats)w * AsFloat(x); }
};

struct PairOfBfloat16 {  // each the upper half of a float32
  static Floats Plus(Floats sum, Words w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else
    sum += (Floats)(w << 16) * AsFloat(x << 16);
    return sum + (Floats)(w & 0xffff0000u) * AsFloat(x & 0xffff0000u);
#endif
  }
};

template <typename Of, int64_t kColumns>
void Tile(const uint32_t* w, const uint32_t* x, float* y, int64_t depth, int64_t columns) {
  Floats sums[kColumns] = {};
  for (int64_t d = 0; d < depth; ++d, w += kLanes, x += columns) {
    Words line;
    std::memcpy(&line, w, sizeof line);
    __builtin_prefetch(w + kAhead * kLanes);
#pragma GCC unroll 16
    for (int64_t n = 0; n < kColumns; ++n) sums[n] = Of::Plus(sums[n], line, x[n]);
  }
  for (int64_t f = 0; f < kLanes; ++f)
    for (int64_t n = 0; n < kColumns; ++n) y[f * columns + n] = sums[n][f];
}

struct Progress {
  std::atomic<int64_t> next{0}, done{0};
};

// Threads take some blocks of 16 rows at a time. A thread that comes late finds nothing left, and none is waited for
// that has not come, so that products of many devices can share a pool.
template <typename Of>
void Product(ffi::ThreadPool& pool, const uint32_t* w, const uint32_t* x, float* y, int64_t blocks, int64_t depth,
             int64_t columns) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t step = std::max<int64_t>(blocks / (8 * threads), 1);
  auto progress = std::make_shared<Progress>();
  auto some = [=] {
    for (int64_t first; (first = progress->next.fetch_add(step)) < blocks;) {
      const int64_t end = std::min(first + step, blocks);
      for (int64_t b = first; b < end; ++b) {
        const uint32_t* block = w + b * depth * kLanes;
        float* rows = y + b * kLanes * columns;
        int64_t n = 0;
        for (; n + kTile <= columns; n += kTile) Tile<Of, kTile>(block, x + n, rows + n, depth, columns);
        for (; n < columns; n += 8) Tile<Of, 8>(block, x + n, rows + n, depth, columns);
      }
      progress->done.fetch_add(end - first);
    }
  };
  for (int64_t other = 1; other < threads && other * step < blocks; ++other) {
    auto helper = some;
    pool.Schedule(std::move(helper));
  }
  some();
  while (progress->done.load() < blocks) std::this_thread::yield();
}

ffi::Error PackedDot(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::AnyBuffer x, ffi::ResultBuffer<ffi::F32> y) {
  const auto of_w = w.dimensions(), of_x = x.dimensions(), of_y = y->dimensions();
  const bool in_pairs = w.element_type() == ffi::BF16;
  const size_t rank = in_pairs ? 4 : 3;
  if ((!in_pairs && w.element_type() != ffi::F32) || x.element_type() != w.element_type() || of_w.size() != rank ||
      of_w[2] != kLanes || of_x.size() != rank - 1 || of_x[0] != of_w[1] || of_x[1] % 8 || of_y.size() != 2 ||
      of_y[0] != of_w[0] * kLanes || of_y[1] != of_x[1])
    return ffi::Error::InvalidArgument("lines of a matrix, columns of its dtype, 8 N of them, and what they make");
  const auto* lines = static_cast<const uint32_t*>(w.untyped_data());
  const auto* columns = static_cast<const uint32_t*>(x.untyped_data());
  auto product = in_pairs ? Product<PairOfBfloat16> : Product<Float32>;
  product(pool, lines, columns, y->typed_data(), of_w[0], of_w[1], of_x[1]);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TpawPackedDot, PackedDot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
