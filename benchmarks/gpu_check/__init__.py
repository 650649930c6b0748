"""Whether this GPU computes what the recipe needs, and how fast: `make gpu-check`."""
