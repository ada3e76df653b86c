"""What a model knows: bits per byte, choices by likelihood, written answers, the benchmark tasks, lm-eval."""
