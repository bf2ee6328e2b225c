"""`python -m mlx_randygpt` is `mlxgpt`."""

from mlx_randygpt.cli import main

main()
