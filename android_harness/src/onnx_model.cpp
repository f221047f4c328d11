// ONNX Runtime on the CPU: three graphs, keys and values handed from step to step, as vlm/runtimes/onnx.py.

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
        embedding_(open_session(folder + "/embed_tokens.onnx", threads)),
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
    read_names();
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
    for (const Shape& shape : empty_) {
      cache_.push_back(tensor(&nothing_, shape));
    }
  }

  void forward(const float* embeddings, int64_t n, float* logits) override {
    if (n < 1 || position_ + n > sizes_.context) {
      throw std::runtime_error("the sequence would have " + std::to_string(position_ + n) +
                               " tokens, the context holds " + std::to_string(sizes_.context));
    }
    std::vector<int64_t> positions(static_cast<size_t>(n));
    std::iota(positions.begin(), positions.end(), position_);
    std::vector<const char*> inputs{"inputs_embeds", "position_ids"};
    std::vector<const char*> outputs{"logits"};
    std::vector<Ort::Value> values;
    values.push_back(tensor(embeddings, {1, n, sizes_.hidden}));
    values.push_back(tensor(positions.data(), {1, n}));
    for (size_t i = 0; i < past_.size(); ++i) {
      inputs.push_back(past_[i].c_str());
      outputs.push_back(present_[i].c_str());
      values.push_back(std::move(cache_[i]));
    }
    auto found = decoder_.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(), outputs.data(),
                              outputs.size());
    copy_floats(found[0], sizes_.vocabulary, logits);
    cache_.clear();
    std::move(found.begin() + 1, found.end(), std::back_inserter(cache_));
    position_ += n;
  }

 private:
  // past_key_values.<layer>.<key|value> [1, KV, past, d] goes in, present.<layer>.<key|value> comes out.
  void read_names() {
    const Ort::AllocatorWithDefaultOptions allocator;
    const std::string prefix = "past_key_values";
    for (size_t i = 0; i < decoder_.GetInputCount(); ++i) {
      const std::string name = decoder_.GetInputNameAllocated(i, allocator).get();
      if (name.rfind(prefix, 0) != 0) {
        continue;
      }
      Shape shape = input_shape(decoder_, i);
      shape.at(2) = 0;
      past_.push_back(name);
      present_.push_back("present" + name.substr(prefix.size()));
      empty_.push_back(shape);
    }
  }

  OnnxVision vision_;
  Ort::Session embedding_;
  Ort::Session decoder_;
  std::vector<std::string> past_, present_;
  std::vector<Shape> empty_;
  std::vector<Ort::Value> cache_;
  float nothing_ = 0;
  int64_t position_ = 0;
};

}  // namespace

std::unique_ptr<Model> open_model(const std::string& path, int threads, int64_t context) {
  return std::make_unique<OnnxModel>(path, threads, context);
}

}  // namespace pocketvlm
