"""Scripts that build the bundled data and the tiny base."""
