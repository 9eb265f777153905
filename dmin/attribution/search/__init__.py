"""Ways to the best rows: the streamed scan, certified bounds, approximate indices."""
