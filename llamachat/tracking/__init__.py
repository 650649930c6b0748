"""What a step writes down while it runs: the table of metrics, the record in JSON lines, wandb, curves, the dashboard."""
