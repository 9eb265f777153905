"""Utilities for every stage: errors, fingerprints, progress, signals, provenance."""
