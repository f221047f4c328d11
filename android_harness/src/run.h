// The runner's work, whoever asks for it: the program's main, or an app.
#pragma once

#include <string>

namespace pocketvlm {

// Answers the job in `folder` and writes results.txt there. Returns 0 done, 1 the model failed, 2 the job is wrong, with
// the reason on standard error; throws nothing.
int run_job(const std::string& folder);

}  // namespace pocketvlm
