"""Check correctness and speed of this GPU for the recipe: `make gpu-check`."""
