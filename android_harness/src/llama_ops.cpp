// llama::update_cache and llama::custom_sdpa for a process without PyTorch: the wheel has them only in a library that
// needs libtorch. Same names, arguments and layout as ExecuTorch's (extension/llm/custom_ops), so that one program runs
// here and in the stock runner. Float32, batch 1, causal, no mask: what export/_executorch_modules.py writes; anything
// else is refused.

#include "llama_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

// The compiler emits versions for newer CPUs and the loader chooses; NEON is always there on arm64. By level, not by
// "arch=haswell": that one would be chosen on that very processor only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

// Some heads of a cache [S, KV, d]: row t of the first starts at data + t * stride, the next one's `width` floats on.
struct Rows {
  const float* data;
  int64_t stride;
  int64_t width;
};

// e^x for x <= 0 (to 1e-38), as Cephes' expf: the exponent's bits and a polynomial. The library's is called one by one.
INLINE float exp_of_negative(float x) {
  x = std::max(x, -87.0f);
  const auto power = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float y = (x - static_cast<float>(power) * 0.693359375f) + static_cast<float>(power) * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    sum = sum * y + factor;
  }
  const int32_t bits = (power + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return (sum * y * y + y + 1.0f) * scale;
}

// scores [count] = softmax(scores).
INLINE void softmax(float* scores, int64_t count) {
  float largest = scores[0];
#pragma omp simd reduction(max : largest)
  for (int64_t t = 0; t < count; ++t) {
    largest = std::max(largest, scores[t]);
  }
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = exp_of_negative(scores[t] - largest);
    total += scores[t];
  }
  const float factor = 1.0f / total;
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) {
    scores[t] *= factor;
  }
}

// out [heads, width] = softmax(scale * query [heads, width] . keys^T) . values over the first `count` rows; `per_key`
// heads share a key's head; `scores` has room for heads * count. Goes row by row, because the heads of one row lie side
// by side in memory and the rows of one head far apart.
FOR_EVERY_CPU void attend(const float* query, Rows keys, Rows values, int64_t heads, int64_t per_key, int64_t count,
                          float scale, float* scores, float* out) {
  const int64_t width = keys.width;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t head = 0; head < heads; ++head) {
      const float* q = query + head * width;
      const float* key = keys.data + t * keys.stride + head / per_key * width;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < width; ++i) {
        dot += q[i] * key[i];
      }
      scores[head * count + t] = dot * scale;
    }
  }
  for (int64_t head = 0; head < heads; ++head) {
    softmax(scores + head * count, count);
  }
  std::fill(out, out + heads * width, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t head = 0; head < heads; ++head) {
      const float* value = values.data + t * values.stride + head / per_key * width;
      const float weight = scores[head * count + t];
      float* y = out + head * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        y[i] += weight * value[i];
      }
    }
  }
}

bool is_float_of_rank_4(const Tensor& x) { return x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.size(0) == 1; }

// update_cache.out(value [1, N, KV, d], cache [1, S, KV, d], start_pos, *, out): cache[:, start : start + N] = value.
void update_cache(KernelRuntimeContext& context, Span<EValue*> stack) {
  const Tensor value = stack[0]->toTensor();
  const Tensor cache = stack[1]->toTensor();
  const int64_t start = stack[2]->toInt();
  const bool fits = is_float_of_rank_4(value) && is_float_of_rank_4(cache) && value.size(2) == cache.size(2) &&
                    value.size(3) == cache.size(3) && start >= 0 && start + value.size(1) <= cache.size(1);
  ET_KERNEL_CHECK(context, fits, InvalidArgument, );
  const int64_t row = cache.size(2) * cache.size(3);
  std::memcpy(cache.mutable_data_ptr<float>() + start * row, value.const_data_ptr<float>(), value.nbytes());
}

// custom_sdpa.out(query [1, N, H, d], key [1, S, KV, d], value [1, S, KV, d], start_pos, attn_mask, dropout, is_causal,
// scale, *, out [1, N, H, d]): query n sees the rows 0 .. start_pos + n; H / KV query heads share a key head.
void custom_sdpa(KernelRuntimeContext& context, Span<EValue*> stack) {
  const Tensor query = stack[0]->toTensor();
  const Tensor key = stack[1]->toTensor();
  const Tensor value = stack[2]->toTensor();
  const int64_t start = stack[3]->toInt();
  const Tensor out = stack[8]->toTensor();
  const bool supported = stack[4]->isNone() && stack[5]->toDouble() == 0 && stack[6]->toBool() && stack[7]->isNone();
  ET_KERNEL_CHECK(context, supported, NotSupported, );
  const bool fits = is_float_of_rank_4(query) && is_float_of_rank_4(key) && is_float_of_rank_4(value) &&
                    query.size(3) == key.size(3) && key.numel() == value.numel() && query.size(2) % key.size(2) == 0 &&
                    start >= 0 && start + query.size(1) <= key.size(1);
  ET_KERNEL_CHECK(context, fits, InvalidArgument, );
  ET_KERNEL_CHECK(context, executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok, InvalidArgument, );
  const int64_t heads = query.size(2);
  const int64_t kv_heads = key.size(2);
  const int64_t width = query.size(3);
  const int64_t rows = query.size(1);
  const int64_t per_key = heads / kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  const float* q = query.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  const auto rows_of = [&](const Tensor& cache, int64_t kv_head) {
    return Rows{cache.const_data_ptr<float>() + kv_head * width, kv_heads * width, width};
  };
  // Each thread gets a range of kv heads. One query: it streams its part of the cache. Many: a head's keys stay near it
  // for all of them.
  executorch::extension::parallel_for(0, kv_heads, 1, [&](int64_t begin, int64_t end) {
    const int64_t at_once = rows == 1 ? end - begin : 1;
    std::vector<float> scores(static_cast<size_t>(at_once * per_key * (start + rows)));
    for (int64_t first = begin; first < end; first += at_once) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t offset = (row * heads + first * per_key) * width;
        attend(q + offset, rows_of(key, first), rows_of(value, first), at_once * per_key, per_key, start + row + 1,
               scale, scores.data(), y + offset);
      }
    }
  });
}

}  // namespace

namespace pocketvlm {

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {Kernel("llama::update_cache.out", update_cache),
                             Kernel("llama::custom_sdpa.out", custom_sdpa)};
  const auto registered = executorch::runtime::get_registered_kernels();
  all.insert(all.end(), registered.begin(), registered.end());
  return all;
}

}  // namespace pocketvlm
