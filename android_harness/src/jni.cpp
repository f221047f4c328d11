// The runner for the app in android_harness/app: org.pocketvlm.bench.Runner.run(folder).

#include <jni.h>

#include <string>

#include "run.h"

extern "C" JNIEXPORT jint JNICALL Java_org_pocketvlm_bench_Runner_run(JNIEnv* env, jclass, jstring folder) {
  const char* words = env->GetStringUTFChars(folder, nullptr);
  if (words == nullptr) {
    return 1;  // no memory; Java throws when this returns
  }
  const std::string path = words;
  env->ReleaseStringUTFChars(folder, words);
  return pocketvlm::run_job(path);
}
