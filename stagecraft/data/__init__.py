"""From files to batches: readers, packing, and an order that is f(seed, step)."""
