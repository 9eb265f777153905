"""Runs of trainers, read as settings of dmin, one file for each trainer. Imports no torch."""
