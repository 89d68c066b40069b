"""The nouns. Computes nothing."""
