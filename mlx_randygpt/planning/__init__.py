"""Memory and time of a run before it starts, and the speed of this machine."""
