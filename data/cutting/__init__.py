"""The parts of `data/cut.py`: one module a folder of data/, and what they share."""
