"""Training with several processes: the group, its ring of sums, and the heartbeat."""
