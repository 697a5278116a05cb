"""Raw text to text worth training on: filtered, deduplicated, scored, cut to ids."""
