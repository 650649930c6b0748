"""The recipe: its schema, the table of stages, steps with their configuration, and identities."""
