"""Training: the loop, the learning rate, evaluation, reports and saving."""
