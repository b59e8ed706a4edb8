"""Run templates in a worker process."""
