"""The built-in benchmark: small drawn scenes with questions in the prompt formats of the six real benchmarks."""
