"""What a run would do, before it does it: its graph, its data, what each stage costs.

Everything goes the way of a run, in a folder that is removed afterwards; a work
directory, where one is named, is only read.
"""
