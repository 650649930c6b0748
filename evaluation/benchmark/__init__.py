"""Published evaluations on bundled questions: asking them, measuring the answers, one table of several policies."""
