"""Records, from files to packed batches."""
