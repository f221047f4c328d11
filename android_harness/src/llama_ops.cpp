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

// The compiler emits a second version for CPUs with AVX2 and the loader chooses; NEON is always there on arm64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=haswell", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

// Keys or values of one head: row t starts at data + t * stride and has `width` floats.
struct Rows {
  const float* data;
  int64_t stride;
  int64_t width;
};

// out [width] = softmax(scale * query . keys^T) . values over the first `count` rows; `scores` has room for `count`.
FOR_EVERY_CPU void attend(const float* query, Rows keys, Rows values, int64_t count, float scale, float* scores,
                          float* out) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < count; ++t) {
    const float* key = keys.data + t * keys.stride;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < keys.width; ++i) {
      dot += query[i] * key[i];
    }
    scores[t] = dot * scale;
    largest = std::max(largest, scores[t]);
  }
  float total = 0;
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = std::exp(scores[t] - largest);
    total += scores[t];
  }
  std::fill(out, out + values.width, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const float* value = values.data + t * values.stride;
    const float weight = scores[t] / total;
#pragma omp simd
    for (int64_t i = 0; i < values.width; ++i) {
      out[i] += weight * value[i];
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
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  const float* q = query.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  const auto rows_of = [&](const Tensor& cache, int64_t head) {
    return Rows{cache.const_data_ptr<float>() + head / (heads / kv_heads) * width, kv_heads * width, width};
  };
  executorch::extension::parallel_for(0, query.size(1) * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(start + query.size(1)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % heads;
      const int64_t count = start + i / heads + 1;
      attend(q + i * width, rows_of(key, head), rows_of(value, head), count, scale, scores.data(), y + i * width);
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
