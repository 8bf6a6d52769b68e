"""The training library: one loop (run.py) for everything that implements task.py, and what the loop is made of."""
