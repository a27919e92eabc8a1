"""What a task or an actor does to a batch. Plain classes without Ray, testable in one process."""
