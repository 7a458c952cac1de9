"""Low-rank adapters by peft: what trains is small, checkpoints hold it alone, exports merge it."""
