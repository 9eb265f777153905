"""What trainers leave behind, read as settings of dmin: one file a trainer. Imports no torch."""
