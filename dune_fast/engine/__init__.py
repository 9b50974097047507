"""The run: DeepSpeed engine, trainer, schedules, checkpoints, logging."""
