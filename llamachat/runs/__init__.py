"""Run folders: locks, checkpoints, artifacts and fingerprints. Files are complete at any moment at which a command may
be killed."""
