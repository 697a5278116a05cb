"""Where supervision comes from: text goes in, records on disk or scores come out."""
