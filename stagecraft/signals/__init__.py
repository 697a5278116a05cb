"""Where supervision comes from: raters of pairs, reward models, verifiers of texts."""
