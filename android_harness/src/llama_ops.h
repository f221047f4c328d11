// The attention operators of ExecuTorch's LLM programs.
#pragma once

#include <vector>

#include <executorch/runtime/kernel/operator_registry.h>

namespace pocketvlm {

// Our attention operators and every registered kernel, for Module::load_method. Ours are not registered globally: a
// process that also holds ExecuTorch's Python package has others of these names, and a second registration aborts.
std::vector<executorch::runtime::Kernel> kernels();

}  // namespace pocketvlm
