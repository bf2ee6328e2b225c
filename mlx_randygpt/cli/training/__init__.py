"""What `mlxgpt train` does: where a run begins, its folder, screen, signals and ranks."""
