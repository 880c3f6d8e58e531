"""The path for CUDA devices; imported only where it is used, because it needs Triton."""
