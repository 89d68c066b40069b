"""Benchmarks: spalf beside the libraries that do the same, by commands that anyone can run again."""
