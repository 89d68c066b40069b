"""Other libraries' trainers, run by their own interpreter. Modules here import neither spalf's parts nor attrs."""
