// Reading of latents: D in tiles of a fixed size, each as whole vectors of the type of the sums.
//
// Sums are kept in explicit vector lanes and added in an order that depends on D alone: neither on the number of
// threads nor on a tensor's alignment, for which an auto-vectorised reduction may first treat elements one by one.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace ngrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;  // element-wise arithmetic, in GCC and Clang

template <typename T>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(T);

// 64 vectors: few enough that sums in float lanes keep their digits for any width of vectors. Tiles of 12 candidates
// take at most 48 KiB of float, which is within the L2 cache of a core.
constexpr int64_t TILE = 64 * LANES<float>;
constexpr int64_t MAX_CHUNKS = 64;

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof(vector));  // latents need not be aligned
  return vector;
}

template <typename T>
inline void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

template <typename T>
inline T sum_of_lanes(Vector<T> vector) {
  T total = 0;
  for (int64_t lane = 0; lane < LANES<T>; ++lane) total += vector[lane];
  return total;
}

inline int64_t ceil_div(int64_t numerator, int64_t denominator) { return (numerator + denominator - 1) / denominator; }

// Division of D into tiles, and of a prompt's tiles into chunks, the unit of work. The number of chunks is bounded.
struct Split {
  int64_t prompts, dim, tiles, tiles_per_chunk, chunks;

  Split(int64_t prompts, int64_t dim)
      : prompts(prompts),
        dim(dim),
        tiles(ceil_div(dim, TILE)),
        tiles_per_chunk(std::max<int64_t>(1, ceil_div(tiles, MAX_CHUNKS))),  // D may be 0
        chunks(ceil_div(tiles, tiles_per_chunk)) {}

  // Calls work(item, p, begin, count) for all tiles. The tiles of an item (a chunk of a prompt) run in order on one
  // thread. make_work is called once on every thread, so that each work owns its scratch memory.
  template <typename MakeWork>
  void for_each_tile(const MakeWork& make_work) const {
    torch::stable::parallel_for(0, prompts * chunks, 1, [&](int64_t first_item, int64_t last_item) {
      auto work = make_work();
      for (int64_t item = first_item; item < last_item; ++item) {
        const int64_t first = item % chunks * tiles_per_chunk, last = std::min(first + tiles_per_chunk, tiles);
        for (int64_t tile = first; tile < last; ++tile) {
          work(item, item / chunks, tile * TILE, std::min(TILE, dim - tile * TILE));
        }
      }
    });
  }

  // Calls work(p, begin, count, sums) for all tiles, where each item has its own `width` sums, at first zero. Then adds
  // up the items of every prompt in order: [P][width].
  template <typename MakeWork>
  std::vector<double> sum_tiles(int64_t width, const MakeWork& make_work) const {
    std::vector<double> partials(prompts * chunks * width), totals(prompts * width);
    for_each_tile([&] {
      return [&, work = make_work()](int64_t item, int64_t p, int64_t begin, int64_t count) mutable {
        work(p, begin, count, partials.data() + item * width);
      };
    });
    for (int64_t item = 0; item < prompts * chunks; ++item) {
      for (int64_t i = 0; i < width; ++i) totals[item / chunks * width + i] += partials[item * width + i];
    }
    return totals;
  }
};

template <typename Visit>
void with_type(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Float: return visit(float());
    case ScalarType::Double: return visit(double());
    case ScalarType::BFloat16: return visit(c10::BFloat16());
    case ScalarType::Half: return visit(c10::Half());
    default: STD_TORCH_CHECK(false, "ngrpo: expected a floating dtype");
  }
}

// The dtype of sums: float, or double if any input is.
template <typename Visit>
void with_sum_type(ScalarType dtype, const Visit& visit) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "ngrpo: sums are float32 or float64");
  dtype == ScalarType::Double ? visit(double()) : visit(float());
}

template <typename To, typename From>
To convert(From value) {
  if constexpr (std::is_same_v<From, c10::Half> || std::is_same_v<From, c10::BFloat16>) {
    return static_cast<To>(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, c10::Half> || std::is_same_v<To, c10::BFloat16>) {
    return To(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

// A tensor [P, rows, D], or [P, D] for one row each, in any strides and any floating dtype, read tile by tile.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(tensor.scalar_type()),
        strides_{tensor.stride(0), tensor.dim() == 3 ? tensor.stride(1) : 0, tensor.stride(tensor.dim() - 1)} {
    STD_TORCH_CHECK((tensor.dim() == 2 || tensor.dim() == 3) && tensor.is_cpu(),
                    "ngrpo: latents must be two- or three-dimensional CPU tensors");
  }

  // `count` elements of a row as T, padded with zeros to whole vectors: read in place if memory holds them like that,
  // otherwise copied to `scratch`, which holds a tile.
  template <typename T>
  const T* tile(int64_t p, int64_t row, int64_t begin, int64_t count, T* scratch) const {
    const int64_t offset = p * strides_[0] + row * strides_[1] + begin * strides_[2];
    const T* result = scratch;
    with_type(dtype_, [&](auto element) {
      using Element = decltype(element);
      const Element* from = reinterpret_cast<const Element*>(data_) + offset;
      if constexpr (std::is_same_v<Element, T>) {
        if (strides_[2] == 1 && count % LANES<T> == 0) {
          result = from;
          return;
        }
      }
      if (strides_[2] == 1) {
        for (int64_t d = 0; d < count; ++d) scratch[d] = convert<T>(from[d]);
      } else {
        for (int64_t d = 0; d < count; ++d) scratch[d] = convert<T>(from[d * strides_[2]]);
      }
      std::fill(scratch + count, scratch + ceil_div(count, LANES<T>) * LANES<T>, T(0));
    });
    return result;
  }

 private:
  const char* data_;
  ScalarType dtype_;
  int64_t strides_[3];
};

// A tile of all rows of a tensor, with room for rows that cannot be read in place.
template <typename T>
class TileOf {
 public:
  explicit TileOf(int64_t rows) : rows_(rows), scratch_(rows * TILE) {}

  void read(const Rows& tensor, int64_t p, int64_t begin, int64_t count) {
    for (size_t row = 0; row < rows_.size(); ++row) {
      rows_[row] = tensor.tile(p, row, begin, count, &scratch_[row * TILE]);
    }
  }
  const T* operator[](int64_t row) const { return rows_[row]; }

 private:
  std::vector<const T*> rows_;
  std::vector<T> scratch_;
};

}  // namespace ngrpo
