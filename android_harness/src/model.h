// A multi-method ExecuTorch program (vision_encoder, token_embedding, text_decoder) as one sequence's model.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>

namespace pocketvlm {

// Sizes of the program's tensors, read from the program itself.
struct Sizes {
  int64_t pixels;         // elements of the picture, 3 * S * S
  int64_t vision_tokens;  // V
  int64_t patches;        // P; 0 when the program does not return patch features
  int64_t vision_width;   // width of the patch features
  int64_t hidden;         // D
  int64_t vocabulary;
  int64_t context;  // longest sequence in tokens
};

// Not thread-safe: one caller at a time. Every member throws std::runtime_error that names the method and the cause.
class Model {
 public:
  // Loads the program and all three methods. `threads` sizes the process-wide pool of XNNPACK and the kernels.
  Model(const std::string& path, int threads);

  const Sizes& sizes() const { return sizes_; }

  // pixels [1, 3, S, S] -> tokens [V, D] and features [P, vision_width] (skipped when null).
  void encode_image(const float* pixels, float* tokens, float* features);

  // ids [n] -> embeddings [n, D].
  void embed(const int64_t* ids, int64_t n, float* embeddings);

  // Empties the key-value cache: positions start at 0 again and nothing behind a position is ever read.
  void reset() { position_ = 0; }

  // Appends embeddings [n, D] and writes the last position's logits [vocabulary].
  void forward(const float* embeddings, int64_t n, float* logits);

 private:
  std::vector<executorch::runtime::EValue> execute(const char* method,
                                                   const std::vector<executorch::runtime::EValue>& inputs);
  void read_sizes();

  std::unique_ptr<executorch::extension::Module> module_;
  std::vector<int32_t> pixels_shape_;
  Sizes sizes_{};
  int64_t position_ = 0;
};

}  // namespace pocketvlm
