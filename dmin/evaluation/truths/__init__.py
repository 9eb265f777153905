"""Ground truths that scores are compared with."""
