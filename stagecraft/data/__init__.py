"""From files to batches: sources, packing and the pipeline whose order is a function."""
