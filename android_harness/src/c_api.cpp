// The model behind a C interface for vlm/runtimes/executorch.py (ctypes). Every function returns 0, or -1 and a message
// in `error`; nothing throws across the boundary.

#include <cstdint>
#include <cstdio>
#include <exception>

#include "model.h"

using pocketvlm::Model;

namespace {

constexpr int kErrorBytes = 1024;  // the caller's buffer, see _ERROR_BYTES in vlm/runtimes/executorch.py

template <typename Work>
int guarded(char* error, Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& problem) {
    std::snprintf(error, kErrorBytes, "%s", problem.what());
    return -1;
  }
}

}  // namespace

extern "C" {

int pocketvlm_open(const char* path, int threads, Model** model, pocketvlm::Sizes* sizes, char* error) {
  return guarded(error, [&] {
    *model = pocketvlm::open_model(path, threads, 0).release();
    *sizes = (*model)->sizes();
  });
}

void pocketvlm_close(Model* model) { delete model; }

int pocketvlm_encode_image(Model* model, const float* pixels, float* tokens, float* features, char* error) {
  return guarded(error, [&] { model->encode_image(pixels, tokens, features); });
}

int pocketvlm_embed(Model* model, const int64_t* ids, int64_t n, float* embeddings, char* error) {
  return guarded(error, [&] { model->embed(ids, n, embeddings); });
}

void pocketvlm_reset(Model* model) { model->reset(); }

int pocketvlm_forward(Model* model, const float* embeddings, int64_t n, float* logits, char* error) {
  return guarded(error, [&] { model->forward(embeddings, n, logits); });
}

}  // extern "C"
