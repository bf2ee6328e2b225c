"""The screen of a run: the dashboard, the plain log, and the summary behind both."""
