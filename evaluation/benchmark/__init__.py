"""Published benchmarks on bundled questions: ask policies, score their answers, and compare policies in one table."""
