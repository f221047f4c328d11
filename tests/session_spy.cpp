// Preloaded in front of ONNX Runtime: says on standard error how each session is opened, and opens it.

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <string>

namespace {

const OrtApi* real = nullptr;
OrtApi spy;
std::string settings;  // of the session that is opened next

OrtStatus* ORT_API_CALL threads(OrtSessionOptions* options, int count) noexcept {
  settings += " threads=" + std::to_string(count);
  return real->SetIntraOpNumThreads(options, count);
}

OrtStatus* ORT_API_CALL entry(OrtSessionOptions* options, const char* key, const char* value) noexcept {
  settings += std::string(" ") + key + "=" + value;
  return real->AddSessionConfigEntry(options, key, value);
}

OrtStatus* ORT_API_CALL session(const OrtEnv* env, const ORTCHAR_T* path, const OrtSessionOptions* options,
                                OrtSession** out) noexcept {
  std::fprintf(stderr, "session %s%s\n", path, settings.c_str());
  settings.clear();
  return real->CreateSession(env, path, options, out);
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept {
  using Base = const OrtApiBase*(ORT_API_CALL*)();
  real = reinterpret_cast<Base>(dlsym(RTLD_NEXT, "OrtGetApiBase"))()->GetApi(version);
  spy = *real;
  spy.SetIntraOpNumThreads = threads;
  spy.AddSessionConfigEntry = entry;
  spy.CreateSession = session;
  return &spy;
}

const char* ORT_API_CALL version() noexcept { return "spy"; }

const OrtApiBase base{get_api, version};

}  // namespace

extern "C" const OrtApiBase* ORT_API_CALL OrtGetApiBase() noexcept { return &base; }
