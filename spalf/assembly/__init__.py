"""Text to Plan: recipes are read, converted strictly and compiled here, and nowhere else."""
