"""Which pieces of documents stand in which row of a run: decided once, looked up ever after."""
