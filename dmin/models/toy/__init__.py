"""Small models that are trained in seconds, for demos, benchmarks and tests."""
