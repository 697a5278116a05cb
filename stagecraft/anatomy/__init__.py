"""What each stage changed: weights, behaviour, cost, held-out figures."""
