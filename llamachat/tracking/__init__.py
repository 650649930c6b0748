"""What a step writes down while it runs: table of metrics, record in JSON lines, wandb, curves, dashboard."""
