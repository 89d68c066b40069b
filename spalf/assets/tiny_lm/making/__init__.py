"""The steps that made the embedded language model; `train.py` beside this folder is their command line."""
