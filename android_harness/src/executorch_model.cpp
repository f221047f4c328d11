// ExecuTorch: a multi-method program (vision_encoder, token_embedding, text_decoder).

#include "model.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

#include "llama_ops.h"

// The wheel ships the thread pool's library without its header; this is the part of its interface that is used.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace pocketvlm {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr const char* kVision = "vision_encoder";
constexpr const char* kEmbedding = "token_embedding";
constexpr const char* kDecoder = "text_decoder";

// ExecuTorch's default prints every informational line to stderr; errors stay.
void log_errors(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line,
                const char* message, size_t) {
  if (level == kError || level == kFatal) {
    std::fprintf(stderr, "executorch %s:%zu: %s\n", file, line, message);
  }
}

[[maybe_unused]] const bool kQuiet =
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(log_errors, __FILE__));

[[noreturn]] void fail(const std::string& what, Error error) {
  throw std::runtime_error(what + ": ExecuTorch error " + executorch::runtime::to_string(error));
}

// Copies a result into the caller's memory after checking that it has the size the caller was told.
void copy_floats(const EValue& value, int64_t count, float* out, const char* method) {
  if (!value.isTensor() || value.toTensor().scalar_type() != ScalarType::Float || value.toTensor().numel() != count) {
    throw std::runtime_error(std::string(method) + ": " + std::to_string(count) + " floats expected, found something else");
  }
  const float* data = value.toTensor().const_data_ptr<float>();
  std::copy(data, data + count, out);
}

std::vector<int32_t> shape(executorch::runtime::Result<executorch::runtime::TensorInfo> info, const char* method) {
  if (!info.ok()) {
    fail(std::string(method) + ": a tensor was expected among its inputs and outputs", info.error());
  }
  const auto sizes = info->sizes();
  return {sizes.begin(), sizes.end()};
}

class ExecutorchModel final : public Model {
 public:
  // Loads the program and all three methods. `threads` sizes the process-wide pool of XNNPACK and the kernels.
  ExecutorchModel(const std::string& path, int threads);

  void encode_image(const float* pixels, float* tokens, float* features) override;
  void embed(const int64_t* ids, int64_t n, float* embeddings) override;
  // Nothing behind a position is ever read.
  void reset() override { position_ = 0; }
  void forward(const float* embeddings, int64_t n, float* logits) override;

 private:
  std::vector<EValue> execute(const char* method, const std::vector<EValue>& inputs);
  void read_sizes();

  std::unique_ptr<Module> module_;
  std::vector<int32_t> pixels_shape_;
  int64_t position_ = 0;
};

ExecutorchModel::ExecutorchModel(const std::string& path, int threads) {
  if (threads < 1) {
    throw std::runtime_error("threads: at least 1 expected, found " + std::to_string(threads));
  }
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads))) {
    throw std::runtime_error("the thread pool cannot be given " + std::to_string(threads) + " threads");
  }
  module_ = std::make_unique<Module>(path, Module::LoadMode::Mmap);
  if (const Error error = module_->load(); error != Error::Ok) {
    fail(path, error);
  }
  for (const char* method : {kVision, kEmbedding, kDecoder}) {
    if (const Error error = module_->load_method(method, nullptr, nullptr, nullptr, kernels()); error != Error::Ok) {
      fail(path + ": method " + method, error);
    }
  }
  read_sizes();
}

void ExecutorchModel::read_sizes() {
  const auto vision = module_->method_meta(kVision);
  const auto decoder = module_->method_meta(kDecoder);
  if (!vision.ok() || !decoder.ok()) {
    fail("method_meta", vision.ok() ? decoder.error() : vision.error());
  }
  pixels_shape_ = shape(vision->input_tensor_meta(0), kVision);                        // [1, 3, S, S]
  const std::vector<int32_t> tokens = shape(vision->output_tensor_meta(0), kVision);   // [1, V, D]
  const std::vector<int32_t> embeds = shape(decoder->input_tensor_meta(0), kDecoder);  // [1, context, D]
  const std::vector<int32_t> logits = shape(decoder->output_tensor_meta(0), kDecoder);  // [1, 1, vocabulary]
  if (pixels_shape_.size() != 4 || tokens.size() != 3 || embeds.size() != 3 || logits.size() != 3) {
    throw std::runtime_error("the program's tensors have other ranks than a pocketvlm export; export it again");
  }
  sizes_.pixels = std::accumulate(pixels_shape_.begin(), pixels_shape_.end(), int64_t{1}, std::multiplies<>());
  sizes_.vision_tokens = tokens[1];
  sizes_.hidden = tokens[2];
  sizes_.context = embeds[1];
  sizes_.vocabulary = logits[2];
  if (vision->num_outputs() > 1) {
    const std::vector<int32_t> features = shape(vision->output_tensor_meta(1), kVision);  // [1, P, vision_width]
    sizes_.patches = features.at(1);
    sizes_.vision_width = features.at(2);
  }
}

std::vector<EValue> ExecutorchModel::execute(const char* method, const std::vector<EValue>& inputs) {
  auto result = module_->execute(method, inputs);
  if (!result.ok()) {
    fail(method, result.error());
  }
  return std::move(*result);
}

void ExecutorchModel::encode_image(const float* pixels, float* tokens, float* features) {
  auto input = from_blob(const_cast<float*>(pixels), pixels_shape_);
  const std::vector<EValue> outputs = execute(kVision, {input});
  copy_floats(outputs.at(0), sizes_.vision_tokens * sizes_.hidden, tokens, kVision);
  if (features != nullptr && sizes_.patches > 0) {
    copy_floats(outputs.at(1), sizes_.patches * sizes_.vision_width, features, kVision);
  }
}

void ExecutorchModel::embed(const int64_t* ids, int64_t n, float* embeddings) {
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= sizes_.vocabulary) {
      throw std::runtime_error("token id " + std::to_string(ids[i]) + ": the vocabulary has " +
                               std::to_string(sizes_.vocabulary) + " entries");
    }
  }
  // The method was planned for at most `context` ids at once.
  for (int64_t start = 0; start < n; start += sizes_.context) {
    const int64_t count = std::min(sizes_.context, n - start);
    auto input = from_blob(const_cast<int64_t*>(ids + start), {1, static_cast<int32_t>(count)}, ScalarType::Long);
    const std::vector<EValue> outputs = execute(kEmbedding, {input});
    copy_floats(outputs.at(0), count * sizes_.hidden, embeddings + start * sizes_.hidden, kEmbedding);
  }
}

void ExecutorchModel::forward(const float* embeddings, int64_t n, float* logits) {
  if (n < 1 || position_ + n > sizes_.context) {
    throw std::runtime_error("the sequence would have " + std::to_string(position_ + n) + " tokens, the context holds " +
                             std::to_string(sizes_.context));
  }
  std::vector<int64_t> positions(static_cast<size_t>(n));
  std::iota(positions.begin(), positions.end(), position_);
  const auto count = static_cast<int32_t>(n);
  auto embeds = from_blob(const_cast<float*>(embeddings), {1, count, static_cast<int32_t>(sizes_.hidden)});
  auto where = from_blob(positions.data(), {count}, ScalarType::Long);
  const std::vector<EValue> outputs = execute(kDecoder, {embeds, where});
  copy_floats(outputs.at(0), sizes_.vocabulary, logits, kDecoder);
  position_ += n;
}

}  // namespace

std::unique_ptr<Model> open_model(const std::string& path, int threads, int64_t) {
  return std::make_unique<ExecutorchModel>(path, threads);
}

}  // namespace pocketvlm
