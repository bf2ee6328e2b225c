"""The NumPy backend: the reference, and the fallback on a CPU."""
