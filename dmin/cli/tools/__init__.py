"""Small commands without Hydra: status, store, repeat."""
