"""What a step records while it runs: table of metrics, record in JSON lines, wandb, curves, dashboard."""
