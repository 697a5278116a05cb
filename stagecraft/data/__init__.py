"""From files to batches: sources, packing, and an order that is a function."""
