"""Looking at runs and models: metrics, charts, attention and token probabilities."""
