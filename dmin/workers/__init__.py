"""The processes at work on one store: their shards, heartbeats, and the lock."""
