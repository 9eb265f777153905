"""Per-example gradients of a network, layer by layer, while one backward pass runs."""
