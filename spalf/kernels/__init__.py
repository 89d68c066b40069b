"""The operations that cost time, one name each: encode, decode, coactivation."""
