"""The recipe as a list of steps, the plan of a run, and the command line; the only package that imports stages."""
