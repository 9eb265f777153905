"""One file a paper: how a pair of a query and a training example is scored."""
