"""Studies that are more than variations of the adapt words: each module measures, and returns its table and points."""
