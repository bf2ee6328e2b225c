"""Text generation: filters of the distribution, sequences that grow, beams and chat."""
