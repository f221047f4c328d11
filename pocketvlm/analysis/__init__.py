"""A look inside a checkpoint: similarity of features per layer, and attention over pictures (`pocketvlm analyze`)."""
