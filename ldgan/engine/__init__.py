"""What every training run needs: config, run folder, checkpoints, EMA, logs. Knows no model and no data format."""
