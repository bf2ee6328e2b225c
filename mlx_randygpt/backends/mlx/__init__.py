"""The MLX backend, for the GPU of Apple silicon, CUDA and the CPU."""
