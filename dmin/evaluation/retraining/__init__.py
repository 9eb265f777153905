"""Models trained on parts of the data, many at once, for counterfactual ground truths."""
