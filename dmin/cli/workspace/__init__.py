"""The objects that a configuration describes: model, data, stores, queries, benchmark context."""
