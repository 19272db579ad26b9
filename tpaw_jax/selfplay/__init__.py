"""The rounds of self-play, a run's session, and the store of generations and scores."""
