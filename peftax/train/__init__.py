"""Running a method: steps, loops, scores."""
