"""Stand-in until the data rooms are merged."""

build = records = None
