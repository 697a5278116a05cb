"""What each stage changed, from its files: weights, behaviour, cost, a report."""
