"""The parts of `tools/cut_data.py`: one module per folder of data/, and shared code."""
