"""What a trained model says: samples, scores, and the probability of every token."""
