"""What each stage changed, read from finished runs: weights, behaviour, cost, report."""
