"""What each way to spend less saves and loses: `python -m bench.cost`."""
