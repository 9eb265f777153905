"""The attribution methods, one file for each paper."""
