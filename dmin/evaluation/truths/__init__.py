"""Ground truths that a score is held against."""
