"""What a run shows: the dashboard, the plain log and the words both use."""
