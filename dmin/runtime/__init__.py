"""What every stage stands on: errors, fingerprints, progress, signals, records of runs."""
