"""What a configuration describes: model, data, stores, queries, a benchmark's context."""
