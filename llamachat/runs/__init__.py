"""Run folders: locks, checkpoints, artifacts and fingerprints, whole at any moment at which a command may be killed."""
