#include "onnx_vision.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace pocketvlm {
namespace {

const Ort::Env& environment() {
  static const Ort::Env env = [] {
    Ort::Env made(ORT_LOGGING_LEVEL_ERROR, "pocketvlm");
    made.DisableTelemetryEvents();
    return made;
  }();
  return env;
}

}  // namespace

Ort::Session open_session(const std::string& path, int threads, bool spins) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  if (!spins) {
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
  }
  try {
    return Ort::Session(environment(), path.c_str(), options);
  } catch (const Ort::Exception& problem) {
    throw std::runtime_error(path + ": " + problem.what());
  }
}

Shape input_shape(const Ort::Session& session, size_t index) {
  return session.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetShape();
}

Shape output_shape(const Ort::Session& session, size_t index) {
  return session.GetOutputTypeInfo(index).GetTensorTypeAndShapeInfo().GetShape();
}

void copy_floats(const Ort::Value& value, int64_t count, float* out) {
  const auto found = static_cast<int64_t>(value.GetTensorTypeAndShapeInfo().GetElementCount());
  if (found != count) {
    throw std::runtime_error(std::to_string(count) + " floats expected, " + std::to_string(found) + " found");
  }
  const float* data = value.GetTensorData<float>();
  std::copy(data, data + count, out);
}

OnnxVision::OnnxVision(const std::string& path, int threads)
    : session_(open_session(path, threads, false)),
      pixels_(input_shape(session_, 0)),
      tokens_(output_shape(session_, 0)) {
  if (pixels_.size() != 4 || tokens_.size() != 3) {
    throw std::runtime_error(path + ": its tensors have other ranks than a pocketvlm export; export it again");
  }
}

int64_t OnnxVision::pixels() const {
  return std::accumulate(pixels_.begin(), pixels_.end(), int64_t{1}, std::multiplies<>());
}

void OnnxVision::encode(const float* pixels, float* tokens) {
  const std::array<const char*, 1> inputs{"pixel_values"};
  const std::array<const char*, 1> outputs{"image_features"};
  const Ort::Value input = tensor(pixels, pixels_);
  const auto found = session_.Run(Ort::RunOptions{nullptr}, inputs.data(), &input, 1, outputs.data(), 1);
  copy_floats(found[0], this->tokens() * hidden(), tokens);
}

}  // namespace pocketvlm
