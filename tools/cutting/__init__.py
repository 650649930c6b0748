"""The parts of `tools/cut_data.py`: one module a folder of data/, and what they share."""
