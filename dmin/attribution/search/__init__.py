"""Search for the best rows: the streamed scan, certified bounds, approximate indices."""
