// ONNX Runtime on the CPU: three graphs; keys and values grow in place, or from step to step, as vlm/runtimes/onnx.py.

#include <algorithm>
#include <array>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "model.h"
#include "onnx_vision.h"

namespace pocketvlm {
namespace {

class OnnxModel final : public Model {
 public:
  OnnxModel(const std::string& folder, int threads, int64_t context)
      : vision_(folder + "/vision_encoder.onnx", threads),
        embedding_(open_session(folder + "/embed_tokens.onnx", 1)),  // a table's rows: nothing to share
        decoder_(open_session(folder + "/decoder_model_merged.onnx", threads)) {
    if (context < 1) {
      throw std::runtime_error("context: the longest sequence is expected in the job");
    }
    const Shape logits = output_shape(decoder_, 0);  // [1, 1, vocabulary]
    if (logits.size() != 3) {
      throw std::runtime_error(folder + ": the graphs have other ranks than a pocketvlm export; export it again");
    }
    sizes_.pixels = vision_.pixels();
    sizes_.vision_tokens = vision_.tokens();
    sizes_.hidden = vision_.hidden();
    sizes_.vocabulary = logits[2];
    sizes_.context = context;
    read_inputs();
    reset();
  }

  void encode_image(const float* pixels, float* tokens, float*) override { vision_.encode(pixels, tokens); }

  void embed(const int64_t* ids, int64_t n, float* embeddings) override {
    const std::array<const char*, 1> inputs{"input_ids"};
    const std::array<const char*, 1> outputs{"inputs_embeds"};
    const Ort::Value input = tensor(ids, {1, n});
    const auto found = embedding_.Run(Ort::RunOptions{nullptr}, inputs.data(), &input, 1, outputs.data(), 1);
    copy_floats(found[0], n * sizes_.hidden, embeddings);
  }

  void reset() override {
    position_ = 0;
    cache_.clear();
    for (size_t i = 0; i < past_.size(); ++i) {
      cache_.push_back(buffer(i));
    }
  }

  void forward(const float* embeddings, int64_t n, float* logits) override {
    if (n < 1 || position_ + n > sizes_.context) {
      throw std::runtime_error("the sequence would have " + std::to_string(position_ + n) +
                               " tokens, the context holds " + std::to_string(sizes_.context));
    }
    std::vector<int64_t> positions(static_cast<size_t>(n));
    std::iota(positions.begin(), positions.end(), position_);
    std::vector<Ort::Value> given, found;
    given.push_back(tensor(embeddings, {1, n, sizes_.hidden}));
    given.push_back(shared_ ? tensor(mask_.data(), {1, position_ + n}) : tensor(positions.data(), {1, n}));
    std::move(cache_.begin(), cache_.end(), std::back_inserter(given));
    cache_.clear();
    found.emplace_back(nullptr);  // the engine allocates the logits, and what grows
    for (size_t i = 0; i < past_.size(); ++i) {
      found.push_back(shared_ ? buffer(i) : Ort::Value{nullptr});  // past is present: appended to in place
    }
    std::vector<const char*> inputs{"inputs_embeds", shared_ ? "attention_mask" : "position_ids"};
    std::vector<const char*> outputs{"logits"};
    const auto pointer = [](const std::string& name) { return name.c_str(); };
    std::transform(past_.begin(), past_.end(), std::back_inserter(inputs), pointer);
    std::transform(present_.begin(), present_.end(), std::back_inserter(outputs), pointer);
    decoder_.Run(Ort::RunOptions{nullptr}, inputs.data(), given.data(), given.size(), outputs.data(), found.data(),
                 found.size());
    copy_floats(found[0], sizes_.vocabulary, logits);
    std::move(found.begin() + 1, found.end(), std::back_inserter(cache_));
    position_ += n;
  }

 private:
  // past_key_values.<layer>.<key|value> [1, KV, past, d] goes in, present.<layer>.<key|value> comes out: longer, or, of
  // a decoder that asks for the mask (GroupQueryAttention), the same buffer of the whole context.
  void read_inputs() {
    const Ort::AllocatorWithDefaultOptions allocator;
    const std::string prefix = "past_key_values";
    for (size_t i = 0; i < decoder_.GetInputCount(); ++i) {
      const std::string name = decoder_.GetInputNameAllocated(i, allocator).get();
      shared_ = shared_ || name == "attention_mask";
      if (name.rfind(prefix, 0) == 0) {
        past_.push_back(name);
        present_.push_back("present" + name.substr(prefix.size()));
        shapes_.push_back(input_shape(decoder_, i));
      }
    }
    mask_.assign(static_cast<size_t>(sizes_.context), 1);
    for (Shape& shape : shapes_) {
      shape.at(2) = shared_ ? sizes_.context : 0;
      const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
      buffers_.emplace_back(static_cast<size_t>(std::max<int64_t>(count, 1)));  // a tensor without elements has a place
    }
  }

  // Keys or values over our own memory: all of it where it is shared, none of it where they grow.
  Ort::Value buffer(size_t i) const { return tensor(buffers_[i].data(), shapes_[i]); }

  OnnxVision vision_;
  Ort::Session embedding_;
  Ort::Session decoder_;
  bool shared_ = false;
  std::vector<std::string> past_, present_;
  std::vector<Shape> shapes_;                // of past and present keys and values, two per layer
  std::vector<std::vector<float>> buffers_;  // what they lie in
  std::vector<Ort::Value> cache_;
  std::vector<int64_t> mask_;  // ones [S]
  int64_t position_ = 0;
};

}  // namespace

std::unique_ptr<Model> open_model(const std::string& path, int threads, int64_t context) {
  return std::make_unique<OnnxModel>(path, threads, context);
}

}  // namespace pocketvlm
